// The key of a server that has keys: asked for once, kept until the tab is closed, sent with each question.

const NAME = "mlis-key";
let key = "";
try {
  key = sessionStorage.getItem(NAME) ?? "";
} catch {
  // No storage: it is asked for again on the next page.
}

// The server asks for a key, or for another one.
export class KeyNeeded extends Error {}

export const headers = (more) => (key ? { ...more, Authorization: `Bearer ${key}` } : more);

// Throws KeyNeeded where the answer is that a key is needed.
export function checkAnswer(response) {
  if (response.status !== 401 && response.status !== 403) return;
  throw new KeyNeeded(
    response.status === 401
      ? key ? "This key is not known here." : "This server asks for a key."
      : "This key has not the right to this.",
  );
}

// Shows a form above everything else; settles once a key was given.
export function ask(problem) {
  document.getElementById("key-form")?.remove();
  const form = document.createElement("form");
  form.id = "key-form";
  form.className = "banner warning";
  const label = document.createElement("label");
  label.textContent = `${problem} Key: `;
  const field = document.createElement("input");
  field.type = "password";
  field.autocomplete = "off";
  field.required = true;
  const button = document.createElement("button");
  button.textContent = "Use";
  label.append(field);
  form.append(label, button);
  document.querySelector("main").prepend(form);
  field.focus();
  return new Promise((given) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      key = field.value.trim();
      try {
        sessionStorage.setItem(NAME, key);
      } catch {
        // It lasts until the page is left.
      }
      form.remove();
      given();
    });
  });
}
