// Sizes, durations and times as people read them. Times are local, with their age beside.
import { h } from "./dom.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function size(bytes) {
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${UNITS[unit]}`;
}

export function duration(seconds) {
  if (seconds < 60) {
    return `${seconds < 10 ? Math.round(seconds * 10) / 10 : Math.round(seconds)} s`;
  }
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) {
    return `${minutes} min ${Math.round(seconds % 60)} s`;
  }
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** How long a guest's writes take. */
export function latency(ms) {
  return ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : duration(ms / 1000);
}

let aheadMs = 0;

/** Ages are by the host's clock, not by that of whoever looks. */
export function setClock(iso) {
  aheadMs = Date.parse(iso) - Date.now();
}

export const now = () => Date.now() + aheadMs;

function age(ms) {
  const seconds = Math.round(Math.abs(ms) / 1000);
  const text =
    seconds < 60 ? "less than a minute"
    : seconds < 3600 ? `${Math.round(seconds / 60)} min`
    : seconds < 48 * 3600 ? `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60) % 60} min`
    : `${Math.floor(seconds / 86400)} days`;
  return ms < 0 ? `in ${text}` : `${text} ago`;
}

export function local(iso) {
  const at = new Date(iso);
  const sameDay = at.toDateString() === new Date(now()).toDateString();
  const clock = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const pad = (number) => String(number).padStart(2, "0");
  const date = `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
  return sameDay ? `today ${clock}` : `${date} ${clock}`;
}

/** A time with its age, which stays right (`tick`). */
export function time(iso) {
  return h("time", { datetime: iso, "data-age": "" }, `${age(now() - Date.parse(iso))} (${local(iso)})`);
}

/** How long something goes on already; stays right, too. */
export function since(iso) {
  return h("time", { datetime: iso, "data-since": "" }, duration(Math.max(0, (now() - Date.parse(iso)) / 1000)));
}

export function tick() {
  for (const element of document.querySelectorAll("time[data-age], time[data-since]")) {
    const again = "age" in element.dataset ? time(element.dateTime) : since(element.dateTime);
    if (again.textContent !== element.textContent) {
      element.textContent = again.textContent;
    }
  }
}
