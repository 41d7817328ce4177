// The switch of light and dark pages. Data flow: the reader's choice -> the media of the dark style element.
const THEMES = ['auto', 'light', 'dark'];
const MEDIA = { auto: '(prefers-color-scheme: dark)', light: 'not all', dark: 'all' };

function remembered() {
  try { return localStorage.getItem('lightning_mm-theme'); } catch { return null; } // files may have no storage
}

function setTheme(theme) {
  const button = document.getElementById('theme');
  document.getElementById('dark').media = MEDIA[theme];
  button.textContent = `Theme: ${theme}`;
  button.dataset.theme = theme;
  try { localStorage.setItem('lightning_mm-theme', theme); } catch { /* it is forgotten */ }
}

function startTheme() {
  const button = document.getElementById('theme');
  const found = remembered();
  setTheme(THEMES.includes(found) ? found : 'auto');
  button.hidden = false;
  button.addEventListener('click', () => setTheme(THEMES[(THEMES.indexOf(button.dataset.theme) + 1) % THEMES.length]));
}
