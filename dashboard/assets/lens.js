// What the page looks at, held in one place: the view, the theme and the address.
(() => {
  "use strict";

  const lens = (window.lens = window.lens || {});
  const set = (id, props) => window.dash_clientside.set_props(id, props);

  // As the controls last said, or the keyboard since; `matrices` are the options of the control.
  lens.view = { runs: [], matrix: null, step: 1, stage: "update", dark: false };
  lens.known = { newest: 1, recorded: [], matrices: [] };

  // -- theme ----------------------------------------------------------------------------------

  const SAVED = "normuon-lens-theme";
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
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
  lens.view.dark = current() === "dark";

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

  // -- moving ---------------------------------------------------------------------------------

  // What the keyboard asked for and the controls do not show yet.
  const ahead = {};
  let asked = "";

  const show = () => {
    const now = JSON.stringify([lens.view, lens.news]);
    if (now === asked) return;
    asked = now;
    lens.refresh();
  };

  lens.go = (step) => {
    if (step === lens.view.step) return;
    lens.view.step = ahead.step = step;
    show();
  };

  lens.choose = (matrix) => {
    if (matrix === lens.view.matrix) return;
    lens.view.matrix = ahead.matrix = matrix;
    show();
  };

  // Called once the pictures are drawn: moving a control takes longer than drawing some of them.
  lens.controlsFollow = () => {
    const { step, matrix } = ahead;
    delete ahead.step;
    delete ahead.matrix;
    if (step !== undefined) set("step", { value: step });
    if (matrix !== undefined) set("matrix-select", { value: matrix });
  };

  // Bring the pictures of the chosen matrix into sight, if they are not.
  lens.reveal = () => {
    const title = document.getElementById("chosen");
    if (title.getBoundingClientRect().top < window.innerHeight * 0.6) return;
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    title.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  };

  lens.stage = (stage) => set("stage-select", { value: stage });

  lens.nearest = (step) => {
    const away = (known) => Math.abs(known - step);
    return lens.known.recorded.reduce((a, b) => (away(b) < away(a) ? b : a), lens.known.newest);
  };

  // -- address --------------------------------------------------------------------------------

  const remember = () => {
    const { runs, matrix, step, stage } = lens.view;
    const query = {
      runs: runs.map(encodeURIComponent).join(","),
      matrix: encodeURIComponent(matrix),
      step: step >= lens.known.newest ? "latest" : step,
      stage: encodeURIComponent(stage),
    };
    const text = Object.entries(query).map(([key, value]) => `${key}=${value}`).join("&");
    history.replaceState(history.state, "", `?${text}`);
  };

  // Called by Dash whenever a control, the runs or the theme changed.
  const look = (runs, matrix, step, stage, recorded, version, dark, options) => {
    const newest = recorded?.at(-1) ?? 1;
    lens.known = { newest, recorded: recorded || [], matrices: options || [] };
    if (!matrix) return ["", ""];
    lens.view = { runs: runs || [], matrix, step, stage, dark: dark === "dark", ...ahead };
    lens.news = version;
    remember();
    show();
    const end = step >= newest ? ", the newest" : ` of ${newest}`;
    const shown = lens.known.matrices.find((option) => option.value === matrix);
    const where = stage === "update" ? `step ${step}` : `step ${step}, ${stage}`;
    return [`${step}${end}`, `${shown ? shown.label : matrix}  ·  ${where}`];
  };

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

  // A run's line that was replaced gets its age at once.
  new MutationObserver(countOn).observe(document.documentElement, {
    childList: true,
    subtree: true,
  });

  // -- said in passing --------------------------------------------------------------------------

  lens.say = (text) => {
    const status = document.getElementById("said");
    status.textContent = text;
    status.classList.add("shown");
    clearTimeout(status.timer);
    status.timer = setTimeout(() => status.classList.remove("shown"), 2500);
  };

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    lens: {
      link: () => window.location.search,
      scheme: (name) => name,
      theme,
      look,
    },
  });
})();
