// Runs before the first paint, so that a chosen theme does not flash.

(() => {
  const NEXT = { auto: "light", light: "dark", dark: "auto" };
  const LABELS = { auto: ["Auto", "as the system"], light: ["Light", "light"], dark: ["Dark", "dark"] };
  let theme = "auto";
  try {
    theme = localStorage.getItem("theme") ?? "auto";
  } catch {
    // No storage: the choice lasts until the page is left.
  }
  if (!(theme in NEXT)) theme = "auto";

  function apply() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (!button) return;
    const [text, spoken] = LABELS[theme];
    button.textContent = text;
    button.setAttribute("aria-label", `Colours: ${spoken}`);
  }

  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      theme = NEXT[theme];
      try {
        localStorage.setItem("theme", theme);
      } catch {
        // As above.
      }
      apply();
    });
  });
})();
