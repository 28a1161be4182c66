// Curves of several runs over each other, their last numbers, and previews by step.

import { ask, count, empty, labelled, make, problem, select, short, swap } from "./dom.js";

const COLUMNS = [["loss", "loss"], ["validation_loss", "validation loss"], ["grad_norm", "gradient norm"], ["lr", "learning rate"], ["images_per_second", "images/s"], ["data_wait_share", "waiting for data"]];

export function runsTab(given) {
  const runs = given.networks.map((one, number) => ({ ...one, number })).filter((one) => one.run);
  if (!runs.length) return empty("No run was named. Start dit-view with --checkpoint RUN, the folder that dit-train --out named, to see its curves and previews.");

  const boxes = runs.map((run) => make("input", { type: "checkbox", checked: true, value: run.number, onchange: () => draw() }));
  const smooth = select([["1", "smoothed"], ["2", "much smoothed"], ["0", "as logged"]], () => draw());
  const image = make("img", { alt: "curves of the chosen runs", hidden: true });
  const said = make("div");
  const table = make("table");
  const chosen = () => boxes.filter((box) => box.checked).map((box) => box.value);

  const complain = (sentence) => {
    image.hidden = true;
    said.append(problem(sentence));
  };

  const draw = async () => {
    said.replaceChildren();
    const known = await Promise.all(runs.map((run) => ask(`runs/${run.number}`)));
    const shown = known.filter((_, place) => boxes[place].checked);
    const head = make("tr", {}, make("th", {}, "run"), make("th", { class: "number" }, "step"), ...COLUMNS.map(([, words]) => make("th", { class: "number" }, words)));
    const rows = shown.map((run) => make("tr", {}, make("td", {}, run.name), make("td", { class: "number" }, run.step === null ? "–" : count(run.step)), ...COLUMNS.map(([name]) => make("td", { class: "number" }, value(name, run.last[name])))));
    table.replaceChildren(head, ...rows);
    said.append(...shown.filter((run) => run.problem).map((run) => problem(run.problem)));
    const drawn = chosen().filter((number) => !known[runs.findIndex((run) => String(run.number) === number)].problem);
    image.hidden ||= !drawn.length;
    if (drawn.length) swap(image, `curves.png?runs=${drawn.join(",")}&smooth=${smooth.value}&at=${Date.now()}`, complain);
    previews(known);
  };
  const value = (name, number) => (number === undefined ? "–" : name === "data_wait_share" ? `${(100 * number).toFixed(1)} %` : short(number));

  const which = select(runs.map((run) => [run.number, run.name]), () => draw());
  const slider = make("input", { type: "range", min: 0, value: 0, oninput: () => show() });
  const at = make("span");
  const preview = make("img", { alt: "preview", hidden: true });
  const none = empty("This run has drawn no previews yet; dit-train --sample-every draws them.");
  let steps = [];
  const previews = (known) => {
    const before = steps.length ? steps[slider.value] : undefined;
    const wasLast = Number(slider.value) === steps.length - 1;
    steps = known[runs.findIndex((run) => String(run.number) === which.value)].previews;
    slider.max = Math.max(0, steps.length - 1);
    slider.value = before === undefined || wasLast || !steps.includes(before) ? slider.max : steps.indexOf(before);
    show();
  };
  const show = () => {
    none.hidden = steps.length > 0;
    slider.disabled = steps.length < 2;
    preview.hidden = !steps.length;
    at.textContent = steps.length ? ` ${count(steps[slider.value])}` : "";
    if (steps.length) swap(preview, `runs/${which.value}/previews/${steps[slider.value]}.png`, (sentence) => said.append(problem(sentence)));
  };
  const stepLabel = labelled("step", slider);
  stepLabel.insertBefore(at, slider);

  const attempt = () => draw().catch((error) => said.replaceChildren(problem(error.message)));
  attempt();
  const often = make("input", { type: "checkbox" });
  setInterval(() => { if (often.checked && often.isConnected && !document.hidden) attempt(); }, 15000);
  return make(
    "div", { class: "columns" },
    make("section", { class: "card" },
      make("h2", {}, "Runs"), ...runs.map((run, place) => make("label", { class: "check" }, boxes[place], run.name)),
      labelled("curves", smooth), make("div", { class: "buttons" }, make("button", { type: "button", class: "main", onclick: attempt }, "Refresh"), make("label", { class: "check" }, often, "every 15 s"))),
    make("section", {},
      make("div", { class: "card" }, make("h2", {}, "Last logged"), make("div", { class: "scroll" }, table), said),
      make("div", { class: "card" }, make("h2", {}, "Curves"), make("figure", {}, image)),
      make("div", { class: "card" }, make("h2", {}, "Previews"), make("div", { class: "row" }, labelled("run", which), stepLabel), none, make("figure", {}, preview))),
  );
}
