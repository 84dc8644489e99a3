// The pictures: asked for in one request, drawn here, and each only when it has changed.
(() => {
  "use strict";

  const lens = (window.lens = window.lens || {});

  const CONFIG = {
    responsive: true,
    // plotly.js 4 offers by default to upload the chart to a company's server.
    showSendToCloud: false,
    displayModeBar: false,
    doubleClick: "reset",
  };
  const OVERVIEW = "overview";
  const RETRY = 3000; // milliseconds, when the server does not answer

  const shown = {}; // by id: key of what is drawn
  const inSight = new Set();
  const windows = {}; // by id: what is zoomed in to
  let subject = {};

  // -- asking ---------------------------------------------------------------------------------

  const panels = () => [...document.querySelectorAll(".graph")];
  const plotOf = (id) => document.querySelector(`#${id} > .plot`);

  class Lost extends Error {
    constructor(status) {
      super(
        {
          0: "The server does not answer. Is normuon-lens dashboard still running? Trying again …",
          403: "The server was started anew: open the address that it printed.",
        }[status] || "The server failed; its terminal says why. Trying again …",
      );
    }
  }

  const ask = async (route, body) => {
    const answer = await fetch(route, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    }).catch(() => ({ status: 0 }));
    if (!answer.ok) throw new Lost(answer.status);
    return answer;
  };

  lens.ask = (route) => ask(route, { ...lens.view, windows });

  // Asked for while the page is still being put together: what the address says is enough.
  const open = async (ids) => {
    const have = Object.fromEntries(ids.map((id) => [id, null]));
    const view = { query: window.location.search, dark: lens.view.dark };
    return (await ask("pictures", { ...view, have })).json();
  };
  const first = open(["loss", "spectrum", "neurons", "timeline"]); // none needs all there is
  first.catch(() => {}); // the next request says what is wrong

  // Ask for news while there may be some; Dash is told, and the controls follow, when there is.
  let listening = false;

  const listen = async () => {
    listening = true;
    let wait = RETRY;
    try {
      const { version, every } = await (await ask("news", {})).json();
      contact(true);
      if (version !== lens.news) window.dash_clientside.set_props("news", { data: version });
      wait = every;
    } catch (error) {
      contact(false, error);
    }
    listening = wait !== null;
    if (listening) setTimeout(listen, wait);
  };

  const update = async (ids) => {
    const have = Object.fromEntries(ids.map((id) => [id, shown[id] || null]));
    const answer = await ask("pictures", { ...lens.view, windows, have });
    await paint(await answer.json());
  };

  // -- when -----------------------------------------------------------------------------------

  const PATIENCE = 3; // rounds
  let running = null;
  let again = false;
  let waited = 0;

  const forget = () => {
    // A zoom belongs to its subject: what else is shown starts unzoomed.
    const { runs, stage, matrix } = lens.view;
    const now = { runs: runs.join(), stage, matrix };
    for (const id of Object.keys(windows)) {
      const same = now.runs === subject.runs && now.stage === subject.stage;
      if (!same || (id !== "imbalance" && now.matrix !== subject.matrix)) delete windows[id];
    }
    subject = now;
  };

  const run = async () => {
    await start;
    do {
      again = false;
      forget();
      const ids = panels().map((panel) => panel.id);
      const near = ids.filter((id) => inSight.has(id));
      await update(near);
      lens.controlsFollow();
      // What is out of sight waits until nothing else is wanted, but not for ever.
      const far = ids.filter((id) => !near.includes(id));
      if (again && ++waited < PATIENCE) continue;
      waited = 0;
      await update([...far, OVERVIEW]);
    } while (again);
    contact(true);
  };

  // Bring all pictures up to date; of several calls meanwhile the last counts.
  lens.refresh = () => {
    placeAll();
    lens.mark();
    if (running) {
      again = true;
      return running;
    }
    running = run()
      .catch((error) => contact(false, error))
      .finally(() => {
        running = null;
        document.body.removeAttribute("aria-busy");
      });
    document.body.setAttribute("aria-busy", "true");
    return running;
  };

  const contact = (there, error) => {
    const lost = document.getElementById("lost");
    if (there && !lost.hidden) lens.refresh(); // what was asked for meanwhile
    lost.hidden = there;
    if (there) return;
    if (!(error instanceof Lost)) throw error;
    lost.textContent = error.message;
    if (!listening) listen();
  };

  // -- drawing --------------------------------------------------------------------------------

  const paint = async (pictures) => {
    for (const [id, picture] of Object.entries(pictures)) {
      shown[id] = picture.key;
      if (id === OVERVIEW) {
        lens.tabulate(picture);
        continue;
      }
      const plot = plotOf(id);
      const fresh = !plot.classList.contains("js-plotly-plot");
      await Plotly.react(plot, picture.data, picture.layout, CONFIG);
      if (fresh) follow(id, plot);
      document.getElementById(`${id}-notes`).textContent = picture.notes.join(" · ");
      document.getElementById(`${id}-summary`).textContent = picture.summary;
      plot.parentElement.dataset.drawn = picture.key;
      if (plot.parentElement.classList.contains("over-steps")) place(plot);
    }
  };

  const follow = (id, plot) => {
    plot.on("plotly_click", ({ points }) => lens.clicked(id, points[0]));
    plot.on("plotly_relayout", () => {
      if (plot.parentElement.classList.contains("over-steps")) place(plot);
      if (!plot.parentElement.dataset.zooms) return;
      const { xaxis, yaxis } = plot._fullLayout;
      const before = JSON.stringify(windows[id]);
      const sides = [...xaxis.range.map(xaxis.r2c), ...yaxis.range.map(yaxis.r2c)];
      const sorted = [Math.min(...sides.slice(0, 2)), Math.max(...sides.slice(0, 2))].concat(
        [Math.min(...sides.slice(2)), Math.max(...sides.slice(2))],
      );
      if (xaxis.autorange && yaxis.autorange) delete windows[id];
      else windows[id] = sorted;
      if (JSON.stringify(windows[id]) !== before) lens.refresh();
    });
  };

  // Names come with their markup made inert for Plotly.
  const plain = (text) =>
    text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  lens.clicked = (id, point) => {
    if (id === "stages") lens.stage(point.x);
    if (id === "imbalance") {
      lens.choose(plain(point.y));
      lens.reveal();
    }
    if (plotOf(id).parentElement.classList.contains("over-steps")) {
      lens.go(lens.nearest(point.x));
    }
  };

  // -- cursor ---------------------------------------------------------------------------------

  // A line laid over the pictures: Plotly would take a quarter second to redraw them for it.
  const place = (plot) => {
    const host = plot.querySelector(".svg-container");
    const subplots = plot.data.length ? Object.values(plot._fullLayout._plots) : [];
    const lines = [...host.querySelectorAll(".cursor")];
    const labels = host.querySelectorAll(":scope > .main-svg")[1] || null; // stay above the line
    for (const line of lines.slice(subplots.length)) line.remove();
    subplots.forEach(({ xaxis, yaxis }, i) => {
      const line = lines[i] || host.insertBefore(document.createElement("div"), labels);
      const across = xaxis.d2p(lens.view.step);
      line.className = "cursor";
      line.dataset.step = lens.view.step;
      line.hidden = across < 0 || across > xaxis._length;
      line.style.left = `${Math.round(xaxis._offset + across)}px`;
      line.style.top = `${yaxis._offset}px`;
      line.style.height = `${yaxis._length}px`;
    });
  };

  const placeAll = () => {
    for (const plot of document.querySelectorAll(".over-steps > .js-plotly-plot")) {
      if (plot._fullLayout?._plots) place(plot); // else not drawn yet
    }
  };

  // -- sizes and sight --------------------------------------------------------------------------

  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const plot = target.firstElementChild;
      if (!plot.classList.contains("js-plotly-plot") || !target.clientWidth) continue;
      Plotly.Plots.resize(plot).then(() => {
        if (target.classList.contains("over-steps")) place(plot);
      });
    }
  });

  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      isIntersecting ? inSight.add(target.id) : inSight.delete(target.id);
    }
  });

  const until = (ready) =>
    new Promise((resolve) => {
      const look = () => (ready() ? resolve() : setTimeout(look, 15));
      look();
    });

  const start = (async () => {
    await until(() => window.Plotly && panels().length);
    for (const panel of panels()) {
      seen.observe(panel);
      resized.observe(panel);
    }
    await first.then(paint, () => {});
    await open(["condition", "imbalance"]).then(paint, () => {});
    listen();
  })();
})();
