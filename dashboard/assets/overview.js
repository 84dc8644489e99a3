// All matrices as a table: which is worst, by whichever figure, at a click on its heading.
(() => {
  "use strict";

  const lens = (window.lens = window.lens || {});
  const SVG = "http://www.w3.org/2000/svg";

  let drawn = null;
  let order = { column: 0, down: true };

  const element = (name, props = {}, ...children) => {
    const made = Object.assign(document.createElement(name), props);
    made.append(...children.filter((child) => child !== null));
    return made;
  };

  const digits = (value) => {
    if (value === null) return "–";
    if (value >= 1e5 || (value > 0 && value < 1e-3)) return value.toExponential(1);
    return value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
  };

  // Columns: the name, then each run's condition number and imbalance.
  const columnsOf = (runs) => [
    { title: "matrix", value: (row, i) => -i },
    ...runs.flatMap((run, at) => [
      { run, title: "condition", value: (row) => row.cells[at]?.condition ?? null },
      { run, title: "imbalance", value: (row) => row.cells[at]?.cv ?? null },
    ]),
  ];

  const sparkline = (path) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("d", path);
    svg.append(line);
    return svg;
  };

  const number = (cell, value, limit, mark = "") => {
    const text = value === null ? "–" : mark + digits(value);
    const shown = element("td", { textContent: text, className: "number" });
    if (value !== null && value > limit) {
      shown.classList.add("bad");
      shown.title = "beyond what is healthy";
    }
    return shown;
  };

  const rowOf = (row, runs, limits) => {
    const chosen = row.name === lens.view.matrix;
    const leads = element("button", { textContent: row.name, className: "leads" });
    leads.dataset.matrix = row.name;
    leads.title = `${row.name}  ·  ${row.m} × ${row.n}`;
    const name = element("th", { scope: "row" }, leads);
    const cells = row.cells.flatMap((cell, at) => {
      if (!cell) return [element("td", { textContent: "–" }), element("td", { textContent: "–" })];
      const cv = number(cell, cell.cv, limits.cv);
      cv.append(sparkline(cell.sparkline));
      if (cell.not_finite) {
        cv.append(element("span", { textContent: " not finite", className: "bad" }));
      }
      return [number(cell, cell.condition, limits.condition, cell.is_bound ? "≥ " : ""), cv];
    });
    const made = element("tr", {}, name, ...cells);
    if (chosen) made.setAttribute("aria-current", "true");
    return made;
  };

  const heading = (column, at) => {
    const button = element("button", { textContent: column.title });
    button.addEventListener("click", () => {
      order = { column: at, down: order.column === at ? !order.down : true };
      show();
      document.querySelectorAll("#overview thead button")[at].focus();
    });
    const made = element("th", { scope: "col" }, button);
    const sorted = order.column === at;
    made.setAttribute("aria-sort", sorted ? (order.down ? "descending" : "ascending") : "none");
    return made;
  };

  const runsOf = (runs) => {
    const cells = runs.map((run) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.backgroundImage = run.swatch;
      const made = element("th", { colSpan: 2, scope: "colgroup" }, swatch, run.name);
      return made;
    });
    return element("tr", {}, element("td"), ...cells);
  };

  const show = () => {
    const place = document.getElementById("overview");
    if (!place || place.hidden || !drawn) return;
    const { runs, rows, limits } = drawn;
    const columns = columnsOf(runs);
    if (order.column >= columns.length) order = { column: 0, down: true };
    const { value } = columns[order.column];
    const keyed = rows.map((row, i) => [value(row, i), row]);
    const sign = order.down ? -1 : 1;
    // What has no figure comes last, whichever way.
    keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b));
    const top = place.scrollTop;
    place.replaceChildren(
      element(
        "table",
        {},
        element("thead", {}, runsOf(runs), element("tr", {}, ...columns.map(heading))),
        element("tbody", {}, ...keyed.map(([, row]) => rowOf(row, runs, limits))),
      ),
    );
    place.scrollTop = top;
  };

  lens.tabulate = (overview) => {
    drawn = overview;
    show();
  };

  lens.mark = () => {
    for (const row of document.querySelectorAll("#overview tbody tr")) {
      const chosen = row.querySelector("button").dataset.matrix === lens.view.matrix;
      chosen ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current");
    }
  };

  // -- map or table ---------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-view]");
    if (!button) return;
    const table = button.dataset.view === "table";
    for (const each of button.parentElement.children) {
      each.setAttribute("aria-pressed", each === button);
    }
    document.getElementById("overview").hidden = !table;
    document.getElementById("imbalance").hidden = table;
    show();
  });
})();
