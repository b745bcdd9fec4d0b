// Draws the charts of a page. Each is <figure><div class="attnlab-chart" id data-alt></div><script type="application/json">.
// The drawn views are in window.attnlabViews by id, for tests and for readers who like consoles.
(() => {
  "use strict";

  const PHONE = 520; // a box narrower than this puts legends below its plots
  const PLOT_MARGIN = 100; // axis labels and padding beside a plot of a composed chart, in pixels
  const DEFAULT_WIDTH = 420; // of a plot that names none; the theme says the same
  const views = (window.attnlabViews = window.attnlabViews || {});

  const isComposed = (spec) => ["hconcat", "vconcat", "concat", "facet", "repeat"].some((key) => key in spec);

  const widthOf = (spec) => {
    if (spec.hconcat) return spec.hconcat.reduce((sum, child) => sum + widthOf(child), 0);
    const stack = spec.vconcat || spec.concat;
    if (stack) return Math.max(...stack.map(widthOf));
    return (typeof spec.width === "number" ? spec.width : DEFAULT_WIDTH) + PLOT_MARGIN;
  };

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
    const title = typeof spec.title === "string" ? { text: spec.title } : { ...spec.title };
    if (typeof title.text === "string") title.text = lines(title.text, width, 8.6);
    if (typeof title.subtitle === "string") title.subtitle = lines(title.subtitle, width, 7);
    return { ...spec, title };
  };

  // A single plot takes the width of its box. Plots side by side go below each other where they do not fit, and a plot
  // wider than the box shrinks to it; on a phone legends go below. Facets keep their size: their box scrolls.
  const fit = (spec, width) => {
    if (width < PHONE) {
      const legend = { orient: "bottom", columns: 2, ...(spec.config && spec.config.legend) };
      spec = { ...spec, config: { ...spec.config, legend } };
    }
    if (isComposed(spec)) return narrow(spec, width);
    const facetted = spec.encoding && ["row", "column", "facet"].some((key) => key in spec.encoding);
    const stepped = spec.width && typeof spec.width === "object";
    return facetted || stepped ? spec : { ...withTitle(spec, width - 24), width: "container" };
  };

  const narrow = (spec, width) => {
    const inside = (children) => children.map((child) => narrow(child, width));
    if (spec.hconcat && widthOf(spec) > width) {
      const { hconcat, ...rest } = spec;
      return { ...withTitle(rest, width), vconcat: inside(hconcat) };
    }
    if (spec.hconcat) return { ...spec, hconcat: spec.hconcat.map((child) => narrow(child, widthOf(child))) };
    if (spec.vconcat) return { ...withTitle(spec, width), vconcat: inside(spec.vconcat) };
    if (spec.concat && widthOf(spec) * (spec.columns || spec.concat.length) > width) {
      return { ...withTitle(spec, width), columns: 1, concat: inside(spec.concat) };
    }
    if (spec.concat || spec.facet || spec.repeat || typeof spec.width === "object") return spec;
    const own = Math.min(widthOf(spec), width);
    return { ...withTitle(spec, own - 24), width: Math.max(own - PLOT_MARGIN, 160) };
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
