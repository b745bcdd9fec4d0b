// Draws the charts of a page. Each is <figure><div class="attnlab-chart" id data-alt></div><script type="application/json">.
// The drawn views are in window.attnlabViews by id, for tests and for readers who like consoles.
(() => {
  "use strict";

  const PLOT_MARGIN = 110; // axis labels and padding beside a plot of a composed chart, in pixels
  const DEFAULT_WIDTH = 420; // of a plot that names none; the theme says the same
  const views = (window.attnlabViews = window.attnlabViews || {});

  const isComposed = (spec) => ["hconcat", "vconcat", "concat", "facet", "repeat"].some((key) => key in spec);

  const widthOf = (spec) => {
    if (spec.hconcat) return spec.hconcat.reduce((sum, child) => sum + widthOf(child), 0);
    const stack = spec.vconcat || spec.concat;
    if (stack) return Math.max(...stack.map(widthOf));
    return (typeof spec.width === "number" ? spec.width : DEFAULT_WIDTH) + PLOT_MARGIN;
  };

  // A single plot takes the width of its box. Plots side by side go below each other where they do not fit, and a plot
  // wider than the box shrinks to it. Facets keep their size: their box scrolls.
  const fit = (spec, width) => {
    if (!isComposed(spec)) {
      const facetted = spec.encoding && ["row", "column", "facet"].some((key) => key in spec.encoding);
      const stepped = spec.width && typeof spec.width === "object";
      return facetted || stepped ? spec : { ...spec, width: "container" };
    }
    return narrow(spec, width);
  };

  const narrow = (spec, width) => {
    if (widthOf(spec) <= width) return spec;
    const { hconcat, ...rest } = spec;
    if (hconcat) return { ...rest, vconcat: hconcat.map((child) => narrow(child, width)) };
    if (spec.vconcat) return { ...spec, vconcat: spec.vconcat.map((child) => narrow(child, width)) };
    if (spec.concat) return { ...spec, columns: 1, concat: spec.concat.map((child) => narrow(child, width)) };
    if (spec.facet || spec.repeat || typeof spec.width === "object") return spec;
    return { ...spec, width: Math.max(width - PLOT_MARGIN, 160) };
  };

  const fail = (box, error) => {
    console.error(`attnlab: chart ${box.id} was not drawn`, error);
    const note = document.createElement("p");
    note.className = "attnlab-error";
    note.setAttribute("role", "alert");
    note.textContent = `This chart could not be drawn: ${error.message}. It shows: ${box.dataset.alt}`;
    box.replaceChildren(note);
  };

  // A <div data-chart data-param data-field> shows the list item "<chart>-<value>" of what is selected in its chart.
  const connectDetail = (view, id) => {
    for (const panel of document.querySelectorAll(`.attnlab-detail[data-chart="${CSS.escape(id)}"]`)) {
      const show = (selection) => {
        const value = selection && selection[panel.dataset.field];
        const item = value && document.getElementById(`${id}-${value[0]}`);
        panel.replaceChildren(...(item ? [...item.childNodes].map((node) => node.cloneNode(true)) : []));
      };
      show(view.signal(panel.dataset.param));
      view.addSignalListener(panel.dataset.param, (_, selection) => show(selection));
    }
  };

  const draw = async (box, spec, layout) => {
    const result = await vegaEmbed(box, layout, { actions: false, renderer: "svg", mode: "vega-lite", tooltip: true });
    views[box.id] = result.view;
    // The drawing is an image with one text. Vega labels the box too, which would be read out twice.
    for (const name of ["role", "aria-label", "aria-roledescription"]) box.removeAttribute(name);
    const svg = box.querySelector("svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", box.dataset.alt);
    connectDetail(result.view, box.id);
    return result;
  };

  const start = async (box) => {
    let result = null;
    let current = "";
    let queue = Promise.resolve();
    try {
      const spec = JSON.parse(box.parentElement.querySelector('script[type="application/json"]').textContent);
      const update = () => {
        const layout = fit(spec, box.clientWidth);
        const text = JSON.stringify(layout);
        if (text === current || box.clientWidth === 0) return queue;
        current = text;
        queue = queue.then(async () => {
          if (result) result.finalize();
          result = await draw(box, spec, layout);
          box.dataset.state = "drawn";
        });
        return queue;
      };
      await update();
      // Also fires when a closed <details> or another tab opens, and when a phone is turned.
      new ResizeObserver(() => {
        if (!current && box.clientWidth === 0) return;
        update().catch((error) => fail(box, error));
        // Vega follows the window only; a box also changes when a sidebar opens.
        window.clearTimeout(box.attnlabTimer);
        box.attnlabTimer = window.setTimeout(() => views[box.id] && views[box.id].container() && resize(box), 80);
      }).observe(box);
    } catch (error) {
      fail(box, error);
    }
  };

  const resize = (box) => {
    const view = views[box.id];
    if (Math.abs(view.width() - box.clientWidth) > 1) window.dispatchEvent(new Event("resize"));
  };

  // Two charts with one id would hide each other: the second takes a number.
  const taken = new Set();
  for (const box of document.querySelectorAll(".attnlab-chart")) {
    let id = box.id;
    for (let n = 2; taken.has(id); n += 1) id = `${box.id}-${n}`;
    taken.add(id);
    box.id = id;
    start(box);
  }
})();
