// Sampling from one checkpoint, or from several with the same noise.

import { JobControl, ask, count, empty, follow, labelled, make, problem, select, setOptions, swap } from "./dom.js";

const SCALES = { class: 4, middle: 1.4, both: 4, network: 2 };
const SOURCES = { class: "by the class", middle: "by the middle head", both: "by both", network: "by another checkpoint" };

// Checkpoint, step and weights; `changed` is told when what it can do is known.
class NetworkPicker {
  constructor(given, changed = () => {}) {
    this.given = given;
    this.changed = changed;
    this.facts = null;
    this.network = select(given.networks.map((one, number) => [number, one.name]), () => this.choose());
    this.step = select([], () => this.read());
    this.weights = select([], () => this.widths());
    this.sigma = make("input", { type: "range", step: "0.005", oninput: () => this.widths() });
    this.width = make("span");
    this.slider = labelled("relative width of the average ", this.sigma);
    this.slider.insertBefore(this.width, this.sigma);
    this.about = make("p", { class: "note" });
    this.stepLabel = labelled("step", this.step);
    this.network.value = Math.max(0, given.networks.findIndex((one) => one.steps.length || !one.run)); // one that can sample
    this.node = make("div", {}, labelled("checkpoint", this.network), make("div", { class: "row" }, this.stepLabel, labelled("weights", this.weights)), this.slider, this.about);
    this.choose();
  }

  choose() {
    const { steps } = this.given.networks[this.network.value];
    setOptions(this.step, [...steps].reverse().map((step) => [step, count(step)]));
    if (steps.length) this.step.value = steps[steps.length - 1];
    this.stepLabel.hidden = !steps.length;
    return this.read();
  }

  async read() {
    const asked = `networks/${this.network.value}${this.step.value ? `?step=${this.step.value}` : ""}`;
    this.asked = asked;
    this.about.textContent = "reading …";
    this.facts = null;
    this.changed(this.facts);
    try {
      const facts = await ask(asked);
      if (this.asked !== asked) return;
      this.facts = facts;
      const parameters = facts.parameters >= 1e6 ? `${(facts.parameters / 1e6).toFixed(1)} M` : count(facts.parameters);
      this.about.textContent = `${facts.model}, ${parameters} parameters, ${facts.objective}, ${facts.image_px} px${this.step.value ? "" : `, step ${count(facts.step)}`}`;
      const power = facts.sigmas.length ? [["sigma", "an average of any width"]] : [];
      setOptions(this.weights, [...facts.weights.map((name) => [name, name === "ema" ? "ema (average)" : name]), ...power]);
      if (power.length) Object.assign(this.sigma, { min: 0.02, max: 0.25, value: this.sigma.value && this.hadSigma ? this.sigma.value : facts.sigmas[0] });
      this.hadSigma = Boolean(power.length);
      this.widths();
    } catch (error) {
      if (this.asked !== asked) return;
      this.about.replaceChildren(problem(error.message));
    }
    this.changed(this.facts);
  }

  widths() {
    this.slider.hidden = this.weights.value !== "sigma";
    this.width.textContent = `σ = ${Number(this.sigma.value).toFixed(3)}`;
  }

  value() {
    const weights = this.weights.value === "sigma" ? `sigma=${Number(this.sigma.value)}` : this.weights.value || "ema";
    return { network: Number(this.network.value), step: this.step.value ? Number(this.step.value) : null, weights };
  }
}

// What else there is to choose, offered as far as the network can do it.
class Settings {
  constructor(given) {
    this.classes = make("input", { placeholder: "names or labels, commas between", oninput: () => this.suggest(), "aria-label": "classes" });
    this.chips = make("div", { class: "chips" });
    this.each = make("input", { type: "number", min: 1, max: 64, value: 4 });
    this.seed = make("input", { type: "number", step: 1, value: 0 });
    const dice = make("button", { type: "button", class: "dice", title: "another seed", onclick: () => { this.seed.value = Math.floor(Math.random() * 1e6); } }, "⚄");
    this.sampler = select([], () => this.bound());
    this.steps = make("input", { type: "number", min: 1, max: 1000, value: 20 });
    this.source = select([], () => this.scaled());
    this.guidance = make("input", { type: "number", min: 0, max: 1000, step: 0.1, value: 4 });
    this.guide = new NetworkPicker(given);
    this.guideBox = make("div", { hidden: true, class: "entry" }, make("span", { class: "label" }, "guide"), this.guide.node);
    this.samplerNote = make("p", { class: "note" });
    this.guidanceNote = make("p", { class: "note" });
    this.classBox = make("div", { class: "classes" }, labelled("classes (none named: all)", this.classes), this.chips);
    this.node = make(
      "div", {}, this.classBox,
      make("div", { class: "row" }, labelled("pictures of each", this.each), labelled("seed", this.seed), dice),
      make("div", { class: "row" }, labelled("sampler", this.sampler), labelled("steps", this.steps)), this.samplerNote,
      make("div", { class: "row" }, labelled("guidance", this.source), make("div", { class: "narrow" }, labelled("scale", this.guidance))),
      this.guidanceNote, this.guideBox,
    );
  }

  offer(facts) {
    if (!facts) return;
    this.facts = facts;
    this.classBox.hidden = !facts.classes.length;
    const sampler = this.sampler.value;
    const source = this.source.value;
    setOptions(this.sampler, facts.samplers.map((one) => [one.name, one.name]));
    if (this.sampler.value !== sampler) { // nothing was chosen, or nothing that this one has
      this.sampler.value = facts.sampler;
      this.steps.value = facts.steps;
    }
    const sources = [facts.can_guide && "class", facts.middle && "middle", facts.middle && facts.can_guide && "both", "network"].filter(Boolean);
    setOptions(this.source, sources.map((name) => [name, SOURCES[name]]).concat(facts.can_guide ? [] : [["none", "none"]]));
    if (this.source.value !== source) {
      this.source.value = facts.can_guide ? "class" : "none";
      this.scaled();
    }
    this.bound();
    this.suggest();
  }

  bound() {
    const chosen = this.facts.samplers.find((one) => one.name === this.sampler.value);
    this.samplerNote.textContent = chosen.help + (chosen.most ? `; at most ${count(chosen.most)} steps` : "");
    this.steps.max = Math.min(1000, chosen.most ?? 1000);
  }

  scaled() {
    const source = this.source.value;
    this.guideBox.hidden = source !== "network";
    this.guidance.disabled = source === "none";
    this.guidance.value = source === "none" ? 1 : SCALES[source];
    this.guidanceNote.textContent = source === "none" ? "this checkpoint has no class to guide away from" : "1 is none";
  }

  // A class by its name, or by its label where the name does not tell it.
  word(label) {
    const name = this.facts.classes[label];
    const unique = this.facts.classes.filter((other) => other.toLowerCase() === name.toLowerCase()).length === 1;
    return unique && !name.includes(",") && !/^-?\d+$/.test(name) ? name : String(label);
  }

  suggest() {
    const words = this.classes.value.split(",");
    const last = words[words.length - 1].trim().toLowerCase();
    const add = (label) => {
      this.classes.value = [...words.slice(0, -1).map((word) => word.trim()), this.word(label)].join(", ");
      this.classes.value += ", ";
      this.suggest();
      this.classes.focus();
    };
    const names = this.facts.classes.map((name, label) => [label, name]);
    const fitting = names.filter(([label, name]) => !last || name.toLowerCase().includes(last) || String(label) === last);
    this.chips.replaceChildren(...fitting.slice(0, 60).map(([label, name]) => make("button", { type: "button", title: `class ${label}`, onclick: () => add(label) }, name)));
  }

  value() {
    const source = this.source.value;
    const number = (field, what) => {
      if (field.value === "" || !field.checkValidity()) throw new Error(`${what} must be a number from ${field.min || "any"} to ${field.max || "any"}`);
      return Number(field.value);
    };
    return {
      classes: this.facts?.classes.length ? this.classes.value.split(",").filter((word) => word.trim()).join(",") : "",
      samples_per_class: number(this.each, "pictures of each"),
      seed: number(this.seed, "the seed"),
      sampler: this.sampler.value || null,
      steps: number(this.steps, "steps"),
      guidance: source === "none" ? 1 : number(this.guidance, "the scale"),
      source: source === "none" ? "class" : source,
      guide: source === "network" ? this.guide.value() : null,
    };
  }
}

// The pictures of a job, each with what can be saved of it.
class Pictures {
  constructor(words) {
    this.node = make("div", { class: "pictures" }, empty(words));
  }

  show(job) {
    if (this.id !== job.id) {
      this.id = job.id;
      this.figures = job.pictures.map((picture) => {
        const image = make("img", { alt: `samples of ${picture.title}`, hidden: true });
        const saves = make("div", { class: "saves" });
        return { image, saves, version: 0, node: make("figure", {}, make("figcaption", {}, picture.title), image, saves) };
      });
      this.node.replaceChildren(...this.figures.map((figure) => figure.node));
    }
    job.pictures.forEach((picture, number) => {
      const figure = this.figures[number];
      if (picture.version > figure.version) {
        figure.version = picture.version;
        swap(figure.image, `jobs/${job.id}/${number}.png?version=${picture.version}`);
      }
      if (picture.files.length && !figure.saves.childElementCount) {
        const links = [["samples.png", "Save the picture"], ["samples.png.json", "Save its settings (JSON)"]];
        figure.saves.append(...links.map(([file, words]) => make("a", { href: `jobs/${job.id}/${number}/${file}`, download: file }, words)));
        figure.node.append(make("details", {}, make("summary", {}, "The same in a terminal"), make("code", {}, picture.command)));
      }
    });
  }
}

export function sampleTab(given) {
  if (!given.networks.length) return empty("No checkpoint was named. Start dit-view with --checkpoint RUN to sample from it.");
  const pictures = new Pictures("Press Sample. The pictures then come out of the noise: on the way every cell shows the image (x₀) that the network expects there.");
  const settings = new Settings(given);
  const control = new JobControl("Sample", (saw) => follow("samples", { networks: [picker.value()], ...settings.value() }, (job) => { saw(job); pictures.show(job); }));
  const picker = new NetworkPicker(given, (facts) => { settings.offer(facts); control.ready(facts); });
  return make("div", { class: "columns" }, make("section", { class: "card" }, picker.node, settings.node, control.buttons, control.status), make("section", { class: "card" }, pictures.node));
}

export function compareTab(given) {
  if (!given.networks.length) return empty("No checkpoint was named. Start dit-view with --checkpoint RUN [RUN …] to compare.");
  const pictures = new Pictures("Press Compare. All checkpoints start from the same noise, so what differs is what they have learned.");
  const settings = new Settings(given);
  const entries = [];
  const list = make("div");
  const more = make("button", { type: "button", onclick: () => add() }, "Add another");
  const control = new JobControl("Compare", (saw) => follow("samples", { networks: entries.map((entry) => entry.value()), ...settings.value() }, (job) => { saw(job); pictures.show(job); }));
  const changed = () => {
    more.disabled = entries.length >= 6;
    for (const button of list.querySelectorAll(":scope > .entry > button")) button.disabled = entries.length <= 2;
    settings.offer(entries[0].facts);
    control.ready(entries.every((entry) => entry.facts));
  };
  const add = () => {
    let entry = null; // it tells of its first reading while it is being made
    entry = new NetworkPicker(given, () => { if (entries.includes(entry)) changed(); });
    const drop = make("button", { type: "button", onclick: () => { entries.splice(entries.indexOf(entry), 1); node.remove(); changed(); } }, "Remove");
    const node = make("div", { class: "entry" }, entry.node, drop);
    entries.push(entry);
    list.append(node);
    changed();
    return entry;
  };
  const first = add();
  const second = add();
  // the next run that can sample, or the first and the last step of one
  const next = given.networks.findIndex((one, number) => number > Number(first.network.value) && (one.steps.length || !one.run));
  const { steps } = given.networks[first.network.value];
  if (next > 0) {
    second.network.value = next;
    second.choose();
  } else if (steps.length > 1) {
    first.step.value = steps[0];
    first.read();
  }
  return make("div", { class: "columns" }, make("section", { class: "card" }, list, more, settings.node, control.buttons, control.status), make("section", { class: "card" }, pictures.node));
}
