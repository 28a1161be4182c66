// The tabs. Each is made when it is first looked at, and then kept.

import { ask, make, problem } from "./dom.js";
import { runsTab } from "./runs.js";
import { compareTab, sampleTab } from "./sample.js";
import { storesTab } from "./stores.js";

const TABS = { sample: ["Sample", sampleTab], compare: ["Compare", compareTab], runs: ["Runs", runsTab], stores: ["Stores", storesTab] };
const bar = document.querySelector("nav");
const main = document.querySelector("main");

async function start() {
  const given = await ask("given");
  const made = {};
  const show = (name) => {
    made[name] ??= TABS[name][1](given);
    main.replaceChildren(made[name]);
    for (const button of bar.children) button.setAttribute("aria-selected", String(button.dataset.tab === name));
    history.replaceState(null, "", `#${name}`);
  };
  bar.replaceChildren(...Object.entries(TABS).map(([name, [words]]) => make("button", { type: "button", role: "tab", "data-tab": name, onclick: () => show(name) }, words)));
  const wanted = location.hash.slice(1);
  show(wanted in TABS ? wanted : given.networks.length ? "sample" : "stores");
}

start().catch((error) => main.replaceChildren(problem(error.message)));
