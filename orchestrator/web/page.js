// The status page: what it knows, when it asks anew, and what it draws then.
import { byId, say, show } from "./dom.js";
import { now, setClock, tick, time } from "./format.js";
import { ask, follow, settled } from "./live.js";
import * as past from "./past.js";
import * as runs from "./runs.js";
import * as storages from "./storages.js";
import * as vms from "./vms.js";

const GAP_MS = 300; // how often it is asked anew at most, whatever happens
const BUSY_MS = 2_000; // how often storages are looked at while something is under way
const OFTEN = new Set(["grant.extended", "grant.refused", "run.phase"]); // these change no history
const known = { status: null, protection: null, history: null, past: [] };
let lastHeard = null;

async function loadStatus() {
  known.status = await ask("status");
  heard();
  drawStatus();
}

async function loadProtection() {
  [known.protection, known.past] = await Promise.all([ask("protection"), past.load()]);
  setClock(known.protection.now);
  heard();
  drawProtection();
}

async function loadHistory() {
  known.history = await ask("storages/history");
}

async function refresh() {
  await Promise.all([loadStatus(), loadProtection(), loadHistory()]);
  drawStatus();
}

const quietly = (load) => () => load().catch(() => {}); // whether the connection is lost is found out by `follow`
const statusSoon = settled(quietly(loadStatus), GAP_MS);
const protectionSoon = settled(quietly(loadProtection), GAP_MS);

function heard() {
  lastHeard = now();
}

function drawStatus() {
  if (known.status === null) {
    return;
  }
  runs.draw(known.status.runs);
  runs.drawQueue(known.status.queue);
  storages.draw(known.status.storages, known.history);
  drawVms();
}

function drawVms() {
  if (known.protection === null) {
    return;
  }
  const phases = new Map((known.status?.queue ?? []).map((one) => [one.vm, "waits"]));
  for (const run of known.status?.runs ?? []) {
    phases.set(run.vm, run.phase);
  }
  vms.draw(known.protection.vms, phases);
}

function drawProtection() {
  const found = vms.verdict(known.protection.vms);
  if (byId("verdict").textContent !== found.text) {
    announce(found.text);
  }
  say("verdict", found.text);
  say("verdict-why", found.why);
  byId("verdict").dataset.state = found.state;
  document.title = found.bad > 0 ? `(${found.bad}) vmfleece: VMs are not protected` : "vmfleece";
  past.offer(known.protection.vms);
  past.draw(known.past);
  drawVms();
}

const announce = (text) => say("announce", text);

function onEvent(event) {
  heard();
  if (event.event === "run.progress") {
    progressed(event);
    return;
  }
  if (event.event === "merge.progress") {
    return;
  }
  statusSoon();
  if (event.event === "run.finished") {
    const why = event.error ? `: ${event.error.message}` : "";
    announce(`Backup of ${event.vm}: ${event.outcome}${why}`);
  }
  if (!OFTEN.has(event.event)) {
    protectionSoon();
  }
}

let drawing = false;

function progressed(event) {
  const run = known.status?.runs.find((one) => one.run === event.run);
  if (run === undefined || event.phase === "queued") {
    statusSoon();
    return;
  }
  const sum = (key) => event.disks.reduce((all, disk) => all + disk[key], 0);
  for (const key of ["size_bytes", "copied_bytes", "fleecing_bytes", "grant_bytes"]) {
    run[key] = sum(key);
  }
  run.phase = event.phase;
  run.disks = event.disks;
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      drawStatus();
    });
  }
}

const SAID = { live: "live", polling: "asking every 5 s", lost: "connection lost" };

function onState(state, why = "") {
  const pill = byId("connection");
  if (pill.dataset.state !== state) {
    pill.dataset.state = state;
    say("connection", SAID[state]);
    announce(state === "lost" ? "" : SAID[state]); // the alarm says it itself
  }
  document.body.classList.toggle("stale", state === "lost");
  if (state === "lost" && byId("lost").hidden) {
    const seen = lastHeard === null ? [] : [" What is shown is of ", time(new Date(lastHeard).toISOString()), "."];
    byId("lost").replaceChildren(`Connection lost: vmfleece does not answer${why ? ` (${why})` : ""}.`, ...seen);
  }
  show("lost", state === "lost");
}

for (const id of ["vm-name", "vm-state"]) {
  byId(id).addEventListener("input", drawVms);
}
byId("vms-all").addEventListener("click", ({ currentTarget: button }) => {
  button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true"));
  drawVms();
});
for (const id of ["run-vm", "run-state", "run-limit"]) {
  byId(id).addEventListener("input", protectionSoon);
}
for (const form of document.querySelectorAll("form")) {
  form.addEventListener("submit", (event) => event.preventDefault());
}
say("host", location.hostname === "" ? "" : `on ${location.host}`);
follow({ onEvent, onState, refresh });
setInterval(() => known.status?.runs.length > 0 && statusSoon(), BUSY_MS);
setInterval(quietly(loadHistory), 30_000);
setInterval(quietly(loadProtection), 60_000); // turns pass without an event
setInterval(tick, 1_000);
