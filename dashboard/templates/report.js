// Draws the figures from the numbers in the page, in the theme that the system has; on paper light.
(() => {
  "use strict";

  const PRINTED = { across: 684, half: 330, height: 290 }; // CSS pixels of an A4 or Letter page

  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touched = matchMedia("(pointer: coarse)");

  const config = {
    responsive: true,
    // plotly.js 4 offers by default to upload the chart to a company's server.
    showSendToCloud: false,
    displaylogo: false,
    displayModeBar: false,
    doubleClick: "reset",
  };

  const draw = (id, size) => {
    const { data, light, dark: night } = pictures[id];
    const layout = { ...(dark.matches && !size ? night : light), ...size };
    // A finger that draws a box cannot scroll past.
    if (touched.matches) layout.dragmode = false;
    layout.uirevision = "same"; // a zoom outlives the theme
    return Plotly.react(id, data, layout, config);
  };

  const ids = Object.keys(pictures);
  const drawAll = () => ids.forEach((id) => draw(id));

  const onPaper = () => {
    for (const id of ids) {
      const across = document.getElementById(id).closest(".across");
      const width = across ? PRINTED.across : PRINTED.half;
      draw(id, { width, height: PRINTED.height, autosize: false });
    }
  };

  addEventListener("beforeprint", onPaper);
  addEventListener("afterprint", drawAll);
  dark.addEventListener("change", drawAll);

  // One after the other, so that reading can begin.
  (async () => {
    for (const id of ids) {
      await draw(id);
      await new Promise((next) => setTimeout(next));
    }
    document.body.dataset.drawn = "all";
  })();
})();
