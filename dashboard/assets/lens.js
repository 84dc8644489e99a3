// What needs no server: the theme, the address, the keyboard, and ages that count on.
(() => {
  "use strict";

  const SAVED = "normuon-lens-theme";
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const set = (id, props) => window.dash_clientside.set_props(id, props);

  // What the page looks at, as the last callback left it; the keyboard starts from here.
  let now = { step: 1, newest: 1, recorded: [], matrix: null, matrices: [] };

  // -- theme ----------------------------------------------------------------------------------

  const saved = () => {
    try {
      return localStorage.getItem(SAVED);
    } catch {
      return null; // storage is forbidden here: follow the system
    }
  };
  const current = () => saved() || (prefersDark.matches ? "dark" : "light");
  // At once, before the first paint; Mantine keeps this attribute from then on.
  document.documentElement.setAttribute("data-mantine-color-scheme", current());
  prefersDark.addEventListener("change", () => saved() || set("theme", { data: current() }));

  const theme = (clicks) => {
    if (clicks) {
      try {
        localStorage.setItem(SAVED, current() === "dark" ? "light" : "dark");
      } catch {
        return document.documentElement.dataset.mantineColorScheme === "dark" ? "light" : "dark";
      }
    }
    return current();
  };

  // -- address --------------------------------------------------------------------------------

  const remember = (runs, matrix, step, stage, newest, recorded, options) => {
    now = { step, newest, recorded: recorded || [], matrix, matrices: options || [] };
    if (!matrix) return ["", ""];
    placeAll();
    const query = {
      runs: (runs || []).map(encodeURIComponent).join(","),
      matrix: encodeURIComponent(matrix),
      step: step >= newest ? "latest" : step,
      stage: encodeURIComponent(stage),
    };
    const text = Object.entries(query).map(([key, value]) => `${key}=${value}`).join("&");
    history.replaceState(history.state, "", `?${text}`);
    const end = step >= newest ? ", the newest" : ` of ${newest}`;
    const shown = now.matrices.find((option) => option.value === matrix);
    const where = stage === "update" ? `step ${step}` : `step ${step}, ${stage}`;
    return [`${step}${end}`, `${shown ? shown.label : matrix}  ·  ${where}`];
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
      const across = xaxis.d2p(now.step);
      line.className = "cursor";
      line.dataset.step = now.step;
      line.hidden = across < 0 || across > xaxis._length;
      line.style.left = `${Math.round(xaxis._offset + across)}px`;
      line.style.top = `${yaxis._offset}px`;
      line.style.height = `${yaxis._length}px`;
    });
  };

  const placeAll = () => {
    for (const plot of document.querySelectorAll(".over-steps .js-plotly-plot")) {
      if (plot._fullLayout?._plots) place(plot); // else not drawn yet
    }
  };

  // -- keyboard -------------------------------------------------------------------------------

  const go = (step) => {
    now.step = step;
    set("step", { value: step });
  };

  const walk = (count) => {
    const { recorded, step } = now;
    if (!recorded.length) return;
    // The step may lie between two recorded ones: start from its place among them.
    const before = recorded.filter((known) => known < step).length;
    const here = count > 0 && recorded[before] !== step ? before - 1 : before;
    go(recorded[Math.min(Math.max(here + count, 0), recorded.length - 1)]);
  };

  const turn = (count) => {
    const names = now.matrices.map((option) => option.value);
    const next = names[names.indexOf(now.matrix) + count];
    if (next === undefined) return;
    now.matrix = next;
    set("matrix-select", { value: next });
  };

  const help = () => {
    const dialog = document.getElementById("help");
    dialog.open ? dialog.close() : dialog.showModal();
  };

  const KEYS = {
    ArrowLeft: () => walk(-1),
    ArrowRight: () => walk(1),
    PageUp: () => walk(-10),
    PageDown: () => walk(10),
    Home: () => go(now.recorded[0] ?? 1),
    End: () => go(now.newest),
    "[": () => turn(-1),
    "]": () => turn(1),
    "?": help,
  };

  // Before the slider's own keys, which know nothing of recorded steps.
  document.addEventListener(
    "keydown",
    (event) => {
      const typing = event.target.closest("input:not([type=checkbox]), textarea");
      const action = KEYS[event.key];
      if (!action || typing || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      action();
    },
    true,
  );

  document.addEventListener("click", (event) => {
    if (event.target.closest("#help-button")) help();
    // A click on the veil around the dialog is a click on the dialog itself.
    if (event.target.id === "help" || event.target.closest("#help-close")) help();
  });

  // -- ages -----------------------------------------------------------------------------------

  const age = (seconds) => {
    if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s ago`;
    if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  };

  const countOn = () => {
    for (const element of document.querySelectorAll("[data-since]")) {
      const text = age(Date.now() / 1000 - Number(element.dataset.since));
      if (element.textContent !== text) element.textContent = text;
    }
  };
  setInterval(countOn, 1000);

  // -- whatever changes on the page -------------------------------------------------------------

  // A picture drawn, zoomed or resized, a run's line replaced: all show as changed elements.
  let due = false;
  new MutationObserver(() => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      countOn();
      placeAll();
    });
  }).observe(document.documentElement, { childList: true, subtree: true });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    lens: {
      link: () => window.location.search,
      scheme: (name) => name,
      theme,
      remember,
    },
  });
})();
