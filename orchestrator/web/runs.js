// What is under way, with each disk's boundary as a strip; and who waits.
import { byId, h, list, say, show, svg } from "./dom.js";
import { duration, latency, since, size, time } from "./format.js";

const KINDS = { "#": "done", ">": "copying", o: "held", ".": "waiting" };
const HEIGHTS = { done: 10, copying: 10, held: 7, waiting: 3 }; // shape says what colour says
const rates = new Map();

/** How fast a run copies, by what was seen of it so far: bytes a second, or null. */
function rate(run) {
  const at = performance.now() / 1000;
  const seen = rates.get(run.run);
  if (seen === undefined || run.copied_bytes < seen.copied) {
    rates.set(run.run, { at, copied: run.copied_bytes, rate: null });
    return null;
  }
  if (at - seen.at >= 1) {
    const latest = (run.copied_bytes - seen.copied) / (at - seen.at);
    seen.rate = seen.rate === null ? latest : 0.7 * seen.rate + 0.3 * latest;
    seen.at = at;
    seen.copied = run.copied_bytes;
  }
  return seen.rate;
}

export function draw(runs) {
  for (const run of rates.keys()) {
    if (!runs.some((one) => one.run === run)) {
      rates.delete(run);
    }
  }
  const cards = runs.map((run) => ({ ...run, rate: run.phase === "copying" ? rate(run) : null }));
  list(byId("runs"), cards, (run) => run.run, card);
  say("running-count", runs.length > 0 ? `${runs.length}` : "");
  show("running-none", runs.length === 0);
  show("legend", runs.some((run) => run.disks.length > 0));
}

const share = (part, whole) => (whole > 0 ? Math.min(100, Math.floor((100 * part) / whole)) : 0);

function card(run) {
  const percent = share(run.copied_bytes, run.size_bytes);
  const left = run.rate > 0 ? `, about ${duration((run.size_bytes - run.copied_bytes) / run.rate)} left` : "";
  const speed = run.rate === null ? "" : `, ${size(run.rate)}/s${left}`;
  return h(
    "article",
    { class: "card run", "data-run": run.run },
    h("h3", {}, run.vm, h("span", { class: "tag" }, run.phase)),
    h("p", { class: "small" }, `${run.job ?? "by hand"} → ${run.target}, run ${run.run}, for `, since(run.started)),
    run.size_bytes > 0 && [
      h("progress", { max: 100, value: percent, "aria-label": `${run.vm}: copied` }),
      h("p", {}, h("strong", {}, `${percent}%`), ` (${size(run.copied_bytes)} of ${size(run.size_bytes)})${speed}`),
    ],
    ...run.disks.map((disk) => drawnDisk(run, disk)),
    run.guest_writes && guestWrites(run),
  );
}

/** What the backup costs the guest: how long its writes take, and took in each of the last seconds. */
function guestWrites(run) {
  const { mean_ms, worst_ms, p99_ms, before_ms } = run.guest_writes;
  const before = before_ms === null ? "" : ` (${latency(before_ms)} before)`;
  const p99 = p99_ms === null ? "" : `, 99 of 100 within ${latency(p99_ms)}`;
  const slowest = worst_ms === null ? "" : `, ${latency(worst_ms)} in the slowest second`;
  const said = mean_ms === null ? `none since the snapshot${before}` : `${latency(mean_ms)} on average${before}${p99}${slowest}`;
  return h(
    "div",
    { class: "disk", "data-writes": mean_ms ?? "" },
    h("p", { class: "small" }, `guest writes: ${said}`),
    run.slowed_to_bytes_per_second !== null && h("p", { class: "small warning" }, `slowed for them to ${size(run.slowed_to_bytes_per_second)}/s`),
    mean_ms !== null && sparkline(run.recent_write_ms, `${run.vm}: guest writes in each of the last seconds, ${said}`),
  );
}

const SECONDS = 60;

function sparkline(values, label) {
  const top = Math.max(1, ...values.map((value) => value ?? 0));
  const bars = values.map((value, at) => {
    const height = value === null ? 0 : Math.max(0.3, (10 * value) / top);
    return svg("rect", { class: "used", x: SECONDS - values.length + at, width: 0.8, y: 10 - height, height });
  });
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${SECONDS} 10`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    ...bars,
  );
}

function drawnDisk(run, disk) {
  const percent = share(disk.copied_bytes, disk.size_bytes);
  const what = disk.incremental ? "of what has changed" : "of the disk";
  const held =
    disk.grant_bytes > 0
      ? `fleecing ${size(disk.fleecing_bytes)} of ${size(disk.grant_bytes)} granted`
      : /^#+$/.test(disk.strip) ? "backed up" : "without fleecing";
  return h(
    "div",
    { class: "disk" },
    h("p", { class: "row" }, h("span", {}, h("b", {}, disk.disk), ` ${size(disk.size_bytes)} ${what}`), h("span", {}, `${percent}%`)),
    strip(disk, `${run.vm} ${disk.disk}: ${percent}% ${what} backed up, ${held}`),
    disk.grant_bytes > 0 && gauge(disk.grant_bytes, [["used", disk.fleecing_bytes]], "thin"),
    h("p", { class: "small" }, held),
  );
}

function strip(disk, label) {
  const cells = disk.strip;
  const pieces = [];
  for (let from = 0, to = 0; from < cells.length; from = to) {
    while (to < cells.length && cells[to] === cells[from]) {
      to += 1;
    }
    const kind = KINDS[cells[from]] ?? "waiting";
    const height = HEIGHTS[kind];
    pieces.push(svg("rect", { class: kind, x: from, width: to - from, y: 10 - height, height }));
  }
  return svg(
    "svg",
    { class: "strip", viewBox: `0 0 ${Math.max(1, cells.length)} 10`, preserveAspectRatio: "none", role: "img", "aria-label": label, "data-strip": cells },
    ...pieces,
  );
}

/** A bar: parts of a whole, the later over the earlier ones. */
export function gauge(whole, parts, more = "") {
  const width = (part) => (whole > 0 ? Math.min(100, (100 * part) / whole) : 0);
  return svg(
    "svg",
    { class: `gauge ${more}`, viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    ...parts.map(([kind, part], at) => svg("rect", { class: kind, x: 0, y: at * 2, width: width(part), height: 10 - at * 4 })),
  );
}

export function drawQueue(queue) {
  list(byId("waiting"), queue, (one) => one.run, waits);
  say("queue-count", queue.length > 0 ? `${queue.length}` : "");
  show("queue-none", queue.length === 0);
}

function waits(one) {
  return h(
    "li",
    {},
    h("strong", {}, one.vm),
    ` ${one.job ?? "by hand"} → ${one.target}, priority ${one.priority}; since `,
    time(one.started),
    one.until && [", tried again ", time(one.until)],
    h("ul", {}, ...one.reasons.map((reason) => h("li", {}, reason))),
  );
}
