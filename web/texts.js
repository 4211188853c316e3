// The pack's own texts in the language of ComfyUI's page. The English ones stand in the code and are the keys;
// locales/<language>/main.json has the others, and where it has none English is shown.

let table = {};

// To be awaited before anything is shown; another language takes effect when the page is loaded again.
export async function loadTexts(api, app) {
  const language = app.ui.settings.getSettingValue("Comfy.Locale") ?? "en";
  if (language === "en") return;
  try {
    const answer = await api.fetchApi("/i18n");
    table = (await answer.json())[language]?.graft?.texts ?? {};
  } catch (error) {
    console.warn("Graft: texts stay in English", error);
  }
}

// A text, with values in the places that $name marks in it.
export function t(text, values = {}) {
  return (table[text] ?? text).replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
}

// Marks a text that is translated where it is shown.
export const text = (english) => english;
