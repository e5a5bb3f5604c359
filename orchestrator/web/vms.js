// How well each VM is protected: the worst first.
import { byId, h, list, say, show } from "./dom.js";
import { time } from "./format.js";

const BAD = ["never", "overdue"];
const FIRST = 12; // so many are shown at first: what is under way is not to be pushed out of sight
const ORDER = ["never", "overdue", "due", "unscheduled", "protected"];
const DUE = { waits: "Its backup waits: see Queue." };
const MARKS = { never: "✖", overdue: "✖", due: "…", unscheduled: "–", protected: "✔" };

/** What the whole of it comes to: a state and two sentences. */
export function verdict(vms) {
  const count = (state) => vms.filter((vm) => vm.state === state).length;
  const bad = vms.filter((vm) => BAD.includes(vm.state)).length;
  const due = count("due");
  const unscheduled = count("unscheduled");
  const promised = vms.length - unscheduled;
  const and = (number, one, many) => (number === 0 ? null : `${number} ${number === 1 ? one : many}`);
  const more = [
    and(count("overdue"), "is overdue", "are overdue"),
    and(count("never"), "was never backed up", "were never backed up"),
    and(due, "is due: its backup is about to begin, under way or waits", "are due: their backups are about to begin, under way or wait"),
    and(unscheduled, "is in no scheduled job", "are in no scheduled job"),
  ].filter(Boolean);
  let text = `All ${promised} scheduled VMs are protected`;
  let state = "good";
  if (bad > 0) {
    text = `${bad} of ${vms.length} VMs ${bad === 1 ? "is" : "are"} not protected`;
    state = "bad";
  } else if (promised === 0) {
    text = "No VM is in a scheduled job";
    state = "unknown";
  } else if (promised === 1) {
    text = "The scheduled VM is protected";
  }
  return { bad, state, text, why: more.length > 0 ? `${more.join("; ")}.` : "" };
}

export function draw(vms, phases) {
  const name = byId("vm-name").value.trim().toLowerCase();
  const state = byId("vm-state").value;
  const meant = vms.filter(
    (vm) =>
      vm.vm.toLowerCase().includes(name) &&
      (state === "" || vm.state === state || (state === "bad" && BAD.includes(vm.state))),
  );
  const rank = (vm) => ORDER.indexOf(vm.state) * 4 + (vm.failure ? 0 : 2) + (phases.has(vm.vm) ? 0 : 1);
  meant.sort((a, b) => rank(a) - rank(b) || a.vm.localeCompare(b.vm));
  const button = byId("vms-all");
  const all = button.getAttribute("aria-expanded") === "true";
  const rows = (all ? meant : meant.slice(0, FIRST)).map((vm) => ({ ...vm, phase: phases.get(vm.vm) ?? "" }));
  list(byId("vms"), rows, (vm) => vm.vm, row);
  say("protection-count", meant.length === vms.length ? `${vms.length}` : `${meant.length} of ${vms.length}`);
  show("vms-none", meant.length === 0);
  show("vms-all", meant.length > FIRST);
  say("vms-all", all ? `Show the first ${FIRST} only` : `Show all ${meant.length}`);
}

function row(vm) {
  return h(
    "tr",
    { "data-state": vm.state, "data-vm": vm.vm },
    h("td", { class: "state" }, h("span", { class: "mark", "aria-hidden": "true" }, MARKS[vm.state]), ` ${vm.state}`),
    h("th", { scope: "row" }, vm.vm, vm.phase && h("span", { class: "tag" }, vm.phase)),
    h("td", { "data-label": "Last good backup" }, vm.last ? last(vm.last) : "none"),
    h("td", { "data-label": "By schedule" }, vm.jobs.length > 0 ? vm.jobs.map(promise) : "no scheduled job"),
    h("td", { "data-label": "What is wrong", class: "why" }, ...trouble(vm)),
  );
}

function last(good) {
  return [time(good.started), good.snapshot && h("small", {}, good.snapshot)].filter(Boolean);
}

function promise(job) {
  const late = job.state === "overdue";
  const missed = job.missed && h("span", late ? { class: "missed" } : {}, late ? "missed " : "due ", time(job.missed), "; ");
  const next = job.next_due ? ["next ", time(job.next_due)] : ["never due again"];
  return h("div", {}, h("strong", {}, job.job), ": ", job.state === "never" && "never yet; ", missed, ...next);
}

function trouble(vm) {
  const failure = vm.failure;
  if (failure) {
    const error = failure.error;
    return [
      h("p", {}, h("strong", {}, error?.code ?? failure.outcome), ": ", error?.message ?? "how it ended is not known"),
      error?.hint && h("p", { class: "hint" }, error.hint),
      h("small", {}, `run ${failure.run}, `, time(failure.started)),
    ];
  }
  const jobs = vm.jobs.map((job) => job.job);
  switch (vm.state) {
    case "overdue":
      return [
        h("p", {}, "Its turn has come, and nothing is being done about it."),
        h("p", { class: "hint" }, "Was vmfleece down then? Back up now: ", h("code", {}, `vmfleece job run ${jobs[0]}`)),
      ];
    case "never":
      return [
        h("p", {}, "No backup that it can be restored from."),
        h("p", { class: "hint" }, "Back up now: ", h("code", {}, `vmfleece backup ${vm.vm}`)),
      ];
    case "unscheduled":
      return [h("p", { class: "hint" }, "Add it to the vms of a job with a schedule.")];
    case "due":
      return [h("p", { class: "fine" }, DUE[vm.phase] ?? (vm.phase ? "Its backup is under way." : "Its backup is about to begin."))];
    default:
      return ["–"];
  }
}
