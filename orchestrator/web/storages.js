// Storages of fleecing images: quota, granted and used, now and over time.
import { byId, h, list, svg } from "./dom.js";
import { local, now, size } from "./format.js";
import { gauge } from "./runs.js";

const WIDTH = 300;
const HEIGHT = 60;

export function draw(storages, history) {
  const items = storages.map((storage) => ({ storage, past: pastOf(storage.name, history) }));
  list(byId("spaces"), items, (item) => item.storage.name, card);
}

function pastOf(name, history) {
  const found = history?.storages.find((one) => one.storage === name);
  return found ? { at: history.at, granted: found.granted_bytes, used: found.used_bytes } : null;
}

function card({ storage, past }) {
  const percent = (part) => `${Math.round((100 * part) / storage.quota_bytes)}%`;
  const notes = [];
  if (storage.stranded_bytes > 0) {
    notes.push(`${size(storage.stranded_bytes)} are kept for images that dead runs may have left in a QEMU`);
  }
  if (storage.free_bytes !== null && storage.floor_bytes !== null && storage.free_bytes < storage.floor_bytes) {
    notes.push(`its file system has ${size(storage.free_bytes)} free, less than min_free (${size(storage.floor_bytes)})`);
  }
  return h(
    "article",
    { class: "card" },
    h("h3", {}, storage.name),
    h("p", { class: "small path" }, storage.path),
    gauge(storage.quota_bytes, [["granted", storage.granted_bytes], ["used", storage.used_bytes]]),
    h(
      "dl",
      {},
      ...[
        ["quota", size(storage.quota_bytes)],
        ["granted", `${size(storage.granted_bytes)} (${percent(storage.granted_bytes)})`],
        ["used", `${size(storage.used_bytes)} (${percent(storage.used_bytes)})`],
        ["most used", size(storage.peak_bytes)],
        ["free in its file system", storage.free_bytes === null ? "unknown" : size(storage.free_bytes)],
        ["runs", storage.max_runs === null ? storage.runs : `${storage.runs} of ${storage.max_runs}`],
      ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
    past && past.at.length > 1 && chart(storage, past),
    ...[...notes, ...storage.lacks].map((note) => h("p", { class: "warning" }, "⚠ ", note)),
  );
}

function chart(storage, past) {
  const start = past.at[0];
  const end = Math.max(now() / 1000, past.at.at(-1));
  const peak = Math.max(...past.granted, storage.granted_bytes);
  const top = peak > storage.quota_bytes / 4 ? storage.quota_bytes : Math.max(peak * 1.25, 1);
  const x = (at) => ((at - start) / Math.max(1, end - start)) * WIDTH;
  const y = (bytes) => HEIGHT - (bytes / top) * HEIGHT;
  // Steps: a point is the most in its interval, until the next one.
  const path = (values, latest) =>
    past.at
      .map((at, number) => `H${x(at).toFixed(1)}V${y(values[number]).toFixed(1)}`)
      .concat(`H${WIDTH}V${y(latest).toFixed(1)}`)
      .join("");
  const most = Math.max(...past.used);
  const label = `${storage.name} since ${local(new Date(start * 1000).toISOString())}: at most ${size(peak)} granted, ${size(most)} used`;
  return h(
    "figure",
    {},
    svg(
      "svg",
      { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
      svg("path", { class: "granted", d: `M0 ${HEIGHT}${path(past.granted, storage.granted_bytes)}V${HEIGHT}Z` }),
      svg("path", { class: "used", d: `M0 ${HEIGHT}${path(past.used, storage.used_bytes)}V${HEIGHT}Z` }),
    ),
    h(
      "figcaption",
      { class: "row small" },
      h("span", {}, local(new Date(start * 1000).toISOString())),
      h("span", {}, `top: ${size(top)}${top === storage.quota_bytes ? " (quota)" : ""}`),
      h("span", {}, "now"),
    ),
    h(
      "ul",
      { class: "legend" },
      h("li", {}, h("span", { class: "swatch granted" }), "granted"),
      h("li", {}, h("span", { class: "swatch used" }), "used"),
    ),
  );
}
