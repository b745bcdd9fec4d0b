// Draws the charts of a page. Each is <figure><div class="attnlab-chart" id data-alt></div><script type="application/json">.
// The drawn views are in window.attnlabViews by id, for tests and for readers who like consoles.
(() => {
  "use strict";

  const PHONE = 520; // a box narrower than this puts legends below its plots
  const PLOT_MARGIN = 100; // axis labels and padding beside a plot of a composed chart, in pixels
  const DEFAULT_WIDTH = 420; // of a plot that names none; the theme says the same
  const views = (window.attnlabViews = window.attnlabViews || {});

  const isComposed = (spec) => ["hconcat", "vconcat", "concat", "facet", "repeat"].some((key) => key in spec);

  // Breaks a title, and its subtitle, into lines that fit: Vega cuts off what is too long.
  const lines = (text, width, letter) => {
    const most = Math.max(Math.floor(width / letter), 12);
    const broken = [];
    for (const word of text.split(" ")) {
      const last = broken[broken.length - 1];
      if (last !== undefined && last.length + 1 + word.length <= most) broken[broken.length - 1] = `${last} ${word}`;
      else broken.push(word);
    }
    return broken;
  };

  const withTitle = (spec, width) => {
    if (!spec.title) return spec;
    const title = typeof spec.title === "string" || Array.isArray(spec.title) ? { text: spec.title } : { ...spec.title };
    if (typeof title.text === "string") title.text = lines(title.text, width, 8.6);
    if (typeof title.subtitle === "string") title.subtitle = lines(title.subtitle, width, 7);
    return { ...spec, title };
  };

  // A single plot takes the width of its box. A composed chart that was drawn wider than the box (`natural`) puts plots
  // below each other and shrinks those that are too wide; on a phone legends go below. Facets keep their size: their
  // box scrolls.
  const fit = (spec, width, natural) => {
    if (width < PHONE) {
      const legend = { orient: "bottom", columns: 2, ...(spec.config && spec.config.legend) };
      spec = { ...spec, config: { ...spec.config, legend } };
    }
    if (isComposed(spec)) return natural > width ? narrow(spec, width) : spec;
    const facetted = spec.encoding && ["row", "column", "facet"].some((key) => key in spec.encoding);
    const stepped = spec.width && typeof spec.width === "object";
    return facetted || stepped ? spec : { ...withTitle(spec, width - 24), width: "container" };
  };

  const narrow = (spec, width) => {
    const inside = (children) => children.map((child) => narrow(child, width));
    if (spec.hconcat) {
      const { hconcat, ...rest } = spec;
      return { ...withTitle(rest, width), vconcat: inside(hconcat) };
    }
    if (spec.vconcat) return { ...withTitle(spec, width), vconcat: inside(spec.vconcat) };
    if (spec.concat) return { ...withTitle(spec, width), columns: 1, concat: inside(spec.concat) };
    if (spec.facet || spec.repeat || typeof spec.width === "object") return spec;
    const own = typeof spec.width === "number" ? spec.width : DEFAULT_WIDTH;
    return { ...withTitle(spec, width - 24), width: Math.min(own, Math.max(width - PLOT_MARGIN, 160)) };
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

  const draw = async (box, layout) => {
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
    let natural = 0; // width of a composed chart as its author arranged it; known once it was drawn
    let queue = Promise.resolve();
    const redraw = async (spec) => {
      const layout = fit(spec, box.clientWidth, natural);
      const text = JSON.stringify(layout);
      if (text === current || box.clientWidth === 0) return;
      current = text;
      if (result) result.finalize();
      result = await draw(box, layout);
      if (natural === 0 && isComposed(spec)) {
        natural = Number(box.querySelector("svg").getAttribute("width"));
        await redraw(spec);
      }
      box.dataset.state = "drawn";
    };
    try {
      const spec = JSON.parse(box.parentElement.querySelector('script[type="application/json"]').textContent);
      const update = () => (queue = queue.then(() => redraw(spec)));
      await update();
      // Also fires when a closed <details> opens, when a sidebar goes and when a phone is turned.
      let width = box.clientWidth;
      new ResizeObserver(() => {
        if (box.clientWidth === width) return;
        width = box.clientWidth;
        window.dispatchEvent(new Event("resize")); // the one thing that a drawn plot listens to
        update().catch((error) => fail(box, error));
      }).observe(box);
    } catch (error) {
      fail(box, error);
    }
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
