// Small helpers for building the document. No string is ever parsed as HTML: the page's policy
// (Trusted Types) makes the browser refuse that.

/**
 * Creates an element.
 *
 * @param {string} tag
 * @param {Object<string, *>} attributes Functions are event listeners; true, false and null set or
 *   leave out an attribute.
 * @param {...(Node|string|null)} children Strings become text.
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** Returns one of the icons of the sprite in the page. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#icon-${name}`);
}

/** Returns a button with an icon, whose label screen readers say and a tooltip shows. */
export function iconButton(name, label, click) {
  return element(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, click },
    icon(name),
  );
}

/** Returns a button that copies what `text()` returns, and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    if (!(await copy(text()))) return;
    setIcon(button, "check");
    button.setAttribute("aria-label", "Copied");
    setTimeout(() => {
      setIcon(button, "copy");
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https, and not on loopback, there is no clipboard API.
    const area = element("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Makes a textarea as high as its text. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Calls a function at most once a frame, or a few times a second in a hidden tab. */
export function oncePerFrame(call) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    const run = () => {
      waits = false;
      call();
    };
    if (document.hidden) setTimeout(run, 250);
    else requestAnimationFrame(run);
  };
}

export const byId = (id) => document.getElementById(id);
