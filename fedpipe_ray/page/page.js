// Draws sections into the page: all of them at once where they are part of it, or as a server sends them anew.
"use strict";
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

// What the reader chose in a figure's menu is chosen in the new one too, by its label.
function keepChoice(plot, figure) {
  const old = plot.layout && plot.layout.updatemenus, menus = figure.layout.updatemenus;
  if (!old || !menus) return;
  const label = (old[0].buttons[old[0].active || 0] || {}).label;
  const active = menus[0].buttons.findIndex((button) => button.label === label);
  if (active < 0) return;
  menus[0].active = active;
  const [traces, layout] = menus[0].buttons[active].args;
  (traces.visible || []).forEach((visible, at) => { figure.data[at].visible = visible; });
  for (const [path, value] of Object.entries(layout || {})) {
    const parts = path.split("."), last = parts.pop();
    const target = parts.reduce((inner, part) => (inner[part] ||= {}), figure.layout);
    target[last] = value;
  }
}

function draw(part, section) {
  const plot = part.querySelector(".plot");
  if (!section.figure) { Plotly.purge(plot); plot.hidden = true; return; }
  plot.hidden = false;
  section.figure.layout.uirevision = "kept";
  keepChoice(plot, section.figure);
  Plotly.react(plot, section.figure.data, section.figure.layout, CONFIG);
}

function show(sections) {
  const main = document.querySelector("main"), wanted = new Set(sections.map((section) => section.key));
  for (const part of [...main.children]) if (!wanted.has(part.id)) part.remove();
  sections.forEach((section, at) => {
    let part = document.getElementById(section.key);
    if (!part) {
      part = document.createElement("section");
      part.id = section.key;
      part.innerHTML = '<div class="head"></div><div class="plot"></div><div class="body"></div>';
    }
    if (main.children[at] !== part) main.insertBefore(part, main.children[at] || null);
    if (part.head !== section.head) part.querySelector(".head").innerHTML = part.head = section.head;
    if (part.body !== section.body) {
      const open = [...part.querySelectorAll("details")].map((one) => one.open);
      part.querySelector(".body").innerHTML = part.body = section.body;
      part.querySelectorAll("details").forEach((one, index) => { one.open = Boolean(open[index]); });
    }
    const drawn = JSON.stringify(section.figure);
    if (part.drawn !== drawn) { part.drawn = drawn; draw(part, section); }
  });
}

// Asks a server for what is new; `version` is what is shown already.
async function follow(url) {
  const state = document.getElementById("state");
  let version = "";
  for (;;) {
    try {
      const answer = await fetch(`${url}?seen=${encodeURIComponent(version)}`);
      if (answer.status === 200) {
        const news = await answer.json();
        document.title = news.title;
        show(news.sections);
        version = news.version;
        state.textContent = news.state;
      } else if (answer.status !== 204) state.textContent = `the server answered ${answer.status}`;
    } catch (error) {
      state.textContent = "fedpipe watch has ended; what it showed last stays here";
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
