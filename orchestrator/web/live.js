// The connection to vmfleece: asked once, then told by server-sent events; where these do not come, asked again.

const API = "api/v1/";
const SILENCE_MS = 40_000;
const POLL_MS = 5_000;
const DEADLINE_MS = 10_000;

export async function ask(path) {
  const answer = await fetch(API + path, { cache: "no-store", signal: AbortSignal.timeout(DEADLINE_MS) });
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer.json();
}

/** Calls `act` soon, and not again before it is done and `gapMs` have passed, however often it is asked for. */
export function settled(act, gapMs) {
  let wanted = false;
  let busy = false;
  async function go() {
    busy = true;
    while (wanted) {
      wanted = false;
      await act();
      await new Promise((done) => setTimeout(done, gapMs));
    }
    busy = false;
  }
  return () => {
    wanted = true;
    if (!busy) {
      go();
    }
  };
}

/**
 * Follow the events. `onEvent` gets each; `onState` is told "live", "polling" (no events, but answers) or "lost";
 * `refresh` asks for everything anew and throws if nobody answers.
 */
export function follow({ onEvent, onState, refresh }) {
  let source = null;
  let streaming = false;

  async function look() {
    try {
      await refresh();
      onState(streaming ? "live" : "polling");
    } catch (error) {
      onState("lost", error.message);
    }
  }

  function open() {
    source?.close();
    source = new EventSource(`${API}events`);
    source.onopen = () => {
      streaming = true;
      look(); // what happened meanwhile may not be kept any more
    };
    source.onerror = () => {
      streaming = false;
      look();
    };
    source.onmessage = (message) => onEvent(JSON.parse(message.data));
  }

  open();
  look();
  setInterval(() => {
    if (source.readyState === EventSource.CLOSED) {
      open(); // an error status ends a source for good
    }
    if (!streaming) {
      look();
    }
  }, POLL_MS);
  // A connection that was cut without a word is noticed by asking, now and then, although it seems to live.
  setInterval(look, SILENCE_MS);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) {
      look();
    }
  });
}
