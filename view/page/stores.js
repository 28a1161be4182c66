// What a store holds, what was left out of it, and its pictures, decoded when they are asked for.

import { JobControl, ask, count, empty, follow, inputs, labelled, make, problem, select, setOptions, swap } from "./dom.js";

const PAGE = 24;

export function storesTab(given) {
  if (!given.stores.length) return empty("No store was named. Start dit-view with --latents STORE, the folder that dit-extract --out named, to look into it.");

  const which = select(given.stores.map((one, number) => [number, one.name]), () => read());
  const label = select([], () => browse(0));
  const view = select([], () => browse(0));
  const compared = select([["", "nothing"], ...(given.data ? [["original", "the image it was made from"]] : []), ["again", "itself, encoded and decoded once more"]], () => browse(first));
  const facts = make("div");
  const tiles = make("div", { class: "tiles" });
  const summary = make("p", { class: "note" });
  let first = 0;
  let all = 0;

  const control = new JobControl("Show", (saw) => {
    const chosen = label.value === "all" ? null : Number(label.value);
    let id = null;
    return follow("browse", { store: Number(which.value), label: chosen, view: Number(view.value || 0), first, compared: compared.value }, (job) => {
      saw(job);
      if (!job.facts.names) return;
      if (id !== job.id) { id = job.id; begin(job); }
      fill(job);
    });
  });
  const before = make("button", { type: "button", disabled: true, onclick: () => browse(Math.max(0, first - PAGE)) }, "← Before");
  const after = make("button", { type: "button", disabled: true, onclick: () => browse(first + PAGE) }, "After →");
  const pages = make("div", { class: "buttons" }, before, after);

  let figures = [];
  const begin = (job) => {
    all = job.facts.all;
    figures = job.facts.names.map((name) => {
      const image = make("img", { alt: `decoded picture of ${name.key}`, hidden: true });
      const error = make("span");
      return { image, error, version: 0, node: make("figure", {}, image, make("figcaption", {}, make("b", {}, name.class), name.key, make("br"), error)) };
    });
    tiles.replaceChildren(...(figures.length ? figures.map((figure) => figure.node) : [empty("There are no pictures of this class in the store.")]));
  };
  const fill = (job) => {
    job.pictures.forEach((picture, number) => {
      const figure = figures[number];
      if (!figure || picture.version <= figure.version) return;
      figure.version = picture.version;
      swap(figure.image, `jobs/${job.id}/${number}.png?version=${picture.version}`);
    });
    const errors = job.facts.errors ?? [];
    errors.forEach((error, number) => { figures[number].error.textContent = `${error.toFixed(1)} dB`; });
    const mean = errors.length ? `; ${compared.value === "original" ? "beside the images they were made from, at their left, the VAE keeps" : "decoded, encoded and decoded again they keep"} ${(errors.reduce((a, b) => a + b, 0) / errors.length).toFixed(1)} dB (mean PSNR)` : "";
    summary.textContent = figures.length ? `${count(first + 1)} to ${count(first + figures.length)} of ${count(all)}, from the means of the posteriors${mean}.` : "";
    before.disabled = first === 0;
    after.disabled = first + PAGE >= all;
  };
  const browse = (from) => { first = from; control.restart(); };

  const read = async () => {
    facts.replaceChildren(empty("Reading the store …"));
    tiles.replaceChildren();
    summary.textContent = "";
    try {
      const store = await ask(`stores/${which.value}`);
      facts.replaceChildren(...about(store, (chosen) => { label.value = String(chosen); browse(0); tiles.scrollIntoView({ block: "nearest" }); }));
      setOptions(label, [["all", "all classes"], ...store.classes.map((one) => [one.label, `${one.name || one.id || one.label} (${count(one.samples)})`])]);
      setOptions(view, store.views.map((name, number) => [number, name]));
      browse(0);
    } catch (error) {
      facts.replaceChildren(problem(error.message));
    }
  };
  read();

  return make(
    "div", { class: "columns" },
    make("section", { class: "card" }, labelled("store", which), labelled("class", label), labelled("view", view),
      labelled("compared with", compared),
      ...(given.data ? [] : [make("p", { class: "note" }, "A store keeps no images: start dit-view with --data, which names those it was made from, to see the VAE's error. What a second round through the VAE changes can be measured without them.")]),
      control.buttons, control.status),
    make("section", {}, make("div", { class: "card" }, make("h2", {}, "Pictures"), summary, tiles, pages), facts),
  );
}

function about(store, choose) {
  const rows = Object.entries(store.facts).map(([name, words]) => make("tr", {}, make("th", {}, name), make("td", {}, words)));
  const most = Math.max(1, ...store.classes.map((one) => one.samples));
  const classes = store.classes.map((one) => make("tr", {},
    make("td", { class: "number" }, String(one.label)),
    make("td", {}, make("button", { type: "button", class: "plain", onclick: () => choose(one.label) }, one.name || one.id || "unnamed")),
    make("td", {}, one.id),
    make("td", { class: "number" }, count(one.samples)),
    make("td", {}, make("progress", { class: "bar", max: most, value: one.samples }))));
  const channels = store.statistics.map((one) => make("tr", {}, ...[String(one.channel), one.mean.toFixed(6), one.std.toFixed(6)].map((words) => make("td", { class: "number" }, words))));
  const { skipped } = store;
  const left = skipped.count
    ? [
      make("p", {}, `${inputs(skipped.count)} left out when the store was made:`),
      make("table", {}, ...skipped.reasons.map((one) => make("tr", {}, make("td", { class: "number" }, count(one.inputs)), make("td", {}, one.reason)))),
      make("details", {}, make("summary", {}, skipped.first.length < skipped.count ? `The first ${count(skipped.first.length)} by name` : "By name"),
        make("div", { class: "scroll" }, make("table", {}, ...skipped.first.map((one) => make("tr", {}, make("td", {}, one.key), make("td", {}, one.reason)))))),
    ]
    : [make("p", { class: "note" }, "Nothing was left out.")];
  const head = (words, numbers) => make("tr", {}, ...words.map((word) => make("th", numbers.includes(word) ? { class: "number" } : {}, word)));
  return [
    make("div", { class: "card" }, make("h2", {}, "What it is"), make("table", {}, ...rows)),
    make("div", { class: "card" }, make("h2", {}, "Samples by class"), make("div", { class: "scroll" }, make("table", {}, head(["label", "class", "folder", "samples", ""], ["label", "samples"]), ...classes))),
    make("div", { class: "card" }, make("h2", {}, "Latents by channel"), make("table", {}, head(["channel", "mean", "standard deviation"], ["channel", "mean", "standard deviation"]), ...channels)),
    make("div", { class: "card" }, make("h2", {}, "Left out"), ...left),
  ];
}
