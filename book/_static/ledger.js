// Filters the claims ledger by verdict and by part.
(() => {
  "use strict";
  for (const ledger of document.querySelectorAll(".attnlab-ledger")) {
    const form = ledger.querySelector(".attnlab-filter");
    const entries = [...ledger.querySelectorAll(".attnlab-entry")];
    const apply = () => {
      for (const entry of entries) {
        entry.hidden = ["verdict", "part"].some((key) => form[key].value && form[key].value !== entry.dataset[key]);
      }
      const shown = entries.filter((entry) => !entry.hidden).length;
      form.querySelector("output").textContent = `${shown} of ${entries.length} claims`;
    };
    form.hidden = false;
    form.addEventListener("change", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }
})();
