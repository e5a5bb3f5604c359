// The history of runs.
import { byId, h, list, show } from "./dom.js";
import { duration, size, time } from "./format.js";
import { ask } from "./live.js";

const OVER = ["succeeded", "warning", "failed", "cancelled", "lost"];
const MARKS = { succeeded: "✔", warning: "⚠", failed: "✖", cancelled: "–", lost: "?" };

/** Those that the filters mean. */
export async function load() {
  const query = new URLSearchParams({ limit: byId("run-limit").value });
  for (const name of ["vm", "state"]) {
    const value = byId(`run-${name}`).value;
    if (value !== "") {
      query.set(name, value);
    }
  }
  const { runs } = await ask(`runs?${query}`);
  return runs.filter((run) => OVER.includes(run.state));
}

export function offer(vms) {
  const choice = byId("run-vm");
  const names = vms.map((vm) => vm.vm);
  const offered = [...choice.options].slice(1).map((option) => option.value);
  if (JSON.stringify(names) !== JSON.stringify(offered)) {
    const chosen = choice.value;
    choice.replaceChildren(choice.options[0], ...names.map((name) => h("option", {}, name)));
    choice.value = names.includes(chosen) ? chosen : "";
  }
}

export function draw(runs) {
  list(byId("past"), runs, (run) => run.run, row);
  show("past-none", runs.length === 0);
}

function row(run) {
  return h(
    "tr",
    { "data-outcome": run.state },
    h("td", { class: "state" }, h("span", { class: "mark", "aria-hidden": "true" }, MARKS[run.state]), ` ${run.state}`),
    h("th", { scope: "row" }, run.vm),
    h("td", { "data-label": "Started" }, time(run.started)),
    h("td", { "data-label": "Took" }, run.duration_seconds === null ? "–" : duration(run.duration_seconds)),
    h("td", { "data-label": "Copied" }, run.copied_bytes === null ? "–" : size(run.copied_bytes)),
    h("td", { "data-label": "What came of it", class: "why" }, ...outcome(run)),
  );
}

function outcome(run) {
  const source = `${run.job ?? "by hand"}, run ${run.run}`;
  if (run.error) {
    return [
      h("p", {}, h("strong", {}, run.error.code), ": ", run.error.message),
      run.error.hint && h("p", { class: "hint" }, run.error.hint),
      h("small", {}, source),
    ];
  }
  return [run.snapshot && h("p", {}, `${run.snapshot}, ${run.kind}`), h("small", {}, source)];
}
