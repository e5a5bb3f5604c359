// Making and updating elements. All text from the API gets in as text, never as markup.

/** An element: `props` are attributes (null or false: left out), children elements or text. */
export function h(tag, props, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Set text if it is another one: what is the same is not announced again. */
export function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

export function show(id, visible) {
  byId(id).hidden = !visible;
}

const drawn = new WeakMap();

/**
 * Have a parent hold one child for each item, in their order, and touch only what is new: focus, selected text and
 * scrolling stay. `key` names an item, `make` makes its element.
 */
export function list(parent, items, key, make) {
  const before = new Map([...parent.children].map((child) => [drawn.get(child)?.key, child]));
  let place = parent.firstChild;
  for (const item of items) {
    const name = key(item);
    const looks = JSON.stringify(item);
    let child = before.get(name);
    before.delete(name);
    if (child === undefined || drawn.get(child).looks !== looks) {
      const made = make(item);
      drawn.set(made, { key: name, looks });
      if (child !== undefined) {
        keepOpen(child, made);
        if (place === child) {
          place = made;
        }
        child.replaceWith(made);
      }
      child = made;
    }
    if (child === place) {
      place = place.nextSibling;
    } else {
      parent.insertBefore(child, place);
    }
  }
  for (const child of before.values()) {
    child.remove();
  }
}

/** What somebody has opened in the old element is open in the new one, and keeps the focus. */
function keepOpen(old, made) {
  const opened = old.querySelector("details[open]");
  const details = made.querySelector("details");
  if (opened && details) {
    details.open = true;
  }
  if (old.contains(document.activeElement)) {
    queueMicrotask(() => made.querySelector("summary, button, a")?.focus({ preventScroll: true }));
  }
}
