// What can be taken away: the link, and of every panel its picture, its numbers and their Python.
(() => {
  "use strict";

  const lens = (window.lens = window.lens || {});

  const copy = async (text, what) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Only secure pages may use the clipboard: an unencrypted address of a network is none.
      const area = document.createElement("textarea");
      area.value = text;
      const host = document.querySelector("dialog[open]") || document.body;
      host.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    lens.say(`${what} copied`);
  };

  const nameOf = (panel) => {
    const { matrix, step } = lens.view;
    return `${panel}-${matrix}-step-${step}`.replace(/[^\w.-]+/g, "_").slice(0, 120);
  };

  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };

  // -- pictures ---------------------------------------------------------------------------------

  // A picture that leaves the page says by itself what it is of.
  const titled = (panel) => {
    const plot = document.querySelector(`#${panel} > .plot`);
    const { matrix, step, stage } = lens.view;
    const about = document.getElementById(`${panel}-title`).textContent;
    const all = ["condition", "imbalance", "loss"].includes(panel);
    const of = all ? stage : `${matrix}, step ${step}, ${stage}`;
    const escaped = of.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    const { width, height } = plot.getBoundingClientRect();
    const margin = { ...plot.layout.margin, t: (plot.layout.margin?.t ?? 24) + 34 };
    const title = { text: `${about} · ${escaped}`, x: 0.02, xanchor: "left", font: { size: 14 } };
    title.y = 0.98;
    title.yanchor = "top";
    const showlegend = true; // the list of runs stays behind
    const size = { width: Math.max(width, 480), height: Math.max(height, 280) + 34 };
    return { data: plot.data, layout: { ...plot.layout, ...size, margin, title, showlegend } };
  };

  const picture = async (panel, format) => {
    const figure = titled(panel);
    const options = { format, width: figure.layout.width, height: figure.layout.height };
    const address = await Plotly.toImage(figure, { ...options, scale: format === "png" ? 2 : 1 });
    const comma = address.indexOf(",");
    const body = address.slice(comma + 1);
    const bytes = address.slice(0, comma).endsWith("base64")
      ? Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0))
      : decodeURIComponent(body);
    const type = format === "png" ? "image/png" : "image/svg+xml";
    save(new Blob([bytes], { type }), `${nameOf(panel)}.${format}`);
  };

  // -- numbers ----------------------------------------------------------------------------------

  const table = ({ columns, rows, total }) => {
    const made = document.createElement("table");
    const head = made.createTHead().insertRow();
    for (const column of columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = column;
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const value of row) line.insertCell().textContent = value ?? "–";
    }
    const caption = made.createCaption();
    caption.textContent =
      rows.length < total ? `The first ${rows.length} of ${total} rows; the CSV has all` : "";
    return made;
  };

  let current = null;

  const open = async (panel) => {
    current = panel;
    const dialog = document.getElementById("taking");
    const part = (name) => dialog.querySelector(`.taking-${name}`);
    part("title").textContent = document.getElementById(`${panel}-title`).textContent;
    part("summary").textContent = document.getElementById(`${panel}-summary`).textContent;
    part("python").textContent = "";
    part("table").replaceChildren("Reading …");
    dialog.showModal();
    const answer = await (await lens.ask(`numbers/${panel}`)).json();
    part("python").textContent = answer.python;
    part("table").replaceChildren(table(answer));
  };

  const TAKE = {
    png: () => picture(current, "png"),
    svg: () => picture(current, "svg"),
    csv: async () => save(await (await lens.ask(`csv/${current}`)).blob(), `${nameOf(current)}.csv`),
    python: () => copy(document.querySelector(".taking-python").textContent, "Python"),
    link: () => copy(window.location.href, "Link"),
  };

  document.addEventListener("click", async (event) => {
    const opener = event.target.closest("[data-panel]");
    const taker = event.target.closest("[data-take]");
    try {
      if (opener) await open(opener.dataset.panel);
      if (taker) await TAKE[taker.dataset.take]();
      if (event.target.closest("#copy-link")) await TAKE.link();
    } catch {
      lens.say("That did not work: the server does not answer");
    }
  });
})();
