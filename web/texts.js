// The pack's texts in the language of ComfyUI's page. locales/<language>/main.json lists their translations in the order of
// the English texts in locales/en/main.json; an empty translation falls back to English.

let table = {};

// Load the translations; await this before anything is shown. Another language needs a reload of the page.
export async function loadTexts(api, app) {
  const language = app.ui.settings.getSettingValue("Comfy.Locale") ?? "en";
  if (language === "en") return;
  try {
    const answer = await api.fetchApi("/i18n");
    const languages = await answer.json();
    const translations = languages[language]?.graft?.texts ?? [];
    table = Object.fromEntries((languages.en?.graft?.texts ?? []).map((english, index) => [english, translations[index]]));
  } catch (error) {
    console.warn("Graft: cannot load the translations; texts stay in English:", error);
  }
}

// Return the translation of a text, with values in place of its $name markers.
export function t(text, values = {}) {
  return (table[text] || text).replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
}

// Mark a text for translation where it is shown.
export const text = (english) => english;
