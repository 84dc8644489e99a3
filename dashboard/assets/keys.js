// The keyboard, playing through the steps, and clicks that lead to a matrix.
(() => {
  "use strict";

  const lens = (window.lens = window.lens || {});

  const walk = (count) => {
    const { recorded } = lens.known;
    const { step } = lens.view;
    if (!recorded.length) return;
    // The step may lie between two recorded ones: start from its place among them.
    const before = recorded.filter((known) => known < step).length;
    const here = count > 0 && recorded[before] !== step ? before - 1 : before;
    lens.go(recorded[Math.min(Math.max(here + count, 0), recorded.length - 1)]);
  };

  const turn = (count) => {
    const names = lens.known.matrices.map((option) => option.value);
    const next = names[names.indexOf(lens.view.matrix) + count];
    if (next !== undefined) lens.choose(next);
  };

  const help = () => {
    const dialog = document.getElementById("help");
    dialog.open ? dialog.close() : dialog.showModal();
  };

  // -- play -----------------------------------------------------------------------------------

  const FRAMES = 240; // of a whole run: longer ones skip steps
  const FRAME = 120; // milliseconds at least
  let playing = false;

  const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  const show = () => {
    const button = document.getElementById("play");
    button.textContent = playing ? "❚❚" : "▶";
    button.setAttribute("aria-pressed", playing);
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
  };

  const play = async () => {
    playing = !playing;
    show();
    if (!playing) return;
    const { recorded, newest } = lens.known;
    if (lens.view.step >= newest) lens.go(recorded[0] ?? 1);
    while (playing && lens.view.step < lens.known.newest) {
      await Promise.all([lens.refresh(), pause(FRAME)]);
      if (playing) walk(Math.ceil(lens.known.recorded.length / FRAMES));
    }
    playing = false;
    show();
  };

  // -- keys -----------------------------------------------------------------------------------

  const KEYS = {
    ArrowLeft: () => walk(-1),
    ArrowRight: () => walk(1),
    PageUp: () => walk(-10),
    PageDown: () => walk(10),
    Home: () => lens.go(lens.known.recorded[0] ?? 1),
    End: () => lens.go(lens.known.newest),
    "[": () => turn(-1),
    "]": () => turn(1),
    " ": play,
    "?": help,
  };

  // A control that only offers choices is not typed in, but its open list has keys of its own.
  const typing = (target) => {
    const field = target.closest("input:not([type=checkbox]), textarea");
    return field && (!field.readOnly || field.getAttribute("aria-expanded") === "true");
  };

  // Before the slider's own keys, which know nothing of recorded steps.
  document.addEventListener(
    "keydown",
    (event) => {
      const action = KEYS[event.key];
      if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
      if (typing(event.target) || event.target.closest("dialog[open]")) return;
      // Space presses what has the focus, and arrows scroll a table.
      const own = event.key === " " ? "button, input, a, summary" : "[role=region]";
      if (event.target.closest(own)) return;
      event.preventDefault();
      event.stopPropagation();
      action();
    },
    true,
  );

  // Plotly keeps a click for itself: without this a control would go on getting the keys.
  const release = () => document.activeElement.blur();

  document.addEventListener("click", (event) => {
    const { target } = event;
    if (target.closest(".plot, [role=option]")) release();
    if (target.closest("#play")) play();
    if (target.closest("#help-button")) help();
    // A click on the veil around a dialog is a click on the dialog itself.
    if (target.matches("dialog") || target.closest("dialog .close")) target.closest("dialog").close();
    const leads = target.closest("[data-matrix]");
    if (leads) {
      lens.choose(leads.dataset.matrix);
      if (leads.dataset.step) lens.go(Number(leads.dataset.step));
      lens.reveal();
    }
  });
})();
