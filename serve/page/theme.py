"""Theme and style sheet of the page. Fonts are those of the client's system, so nothing is loaded from elsewhere."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue="sky",
    neutral_hue="slate",
    radius_size="md",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    # Text has a contrast of at least 4.5 (WCAG 2 AA).
    body_text_color_subdued="*neutral_600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    checkbox_border_color="*neutral_400",
    checkbox_border_color_dark="*neutral_400",
)

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container h1 { margin: .4rem 0 0; letter-spacing: -.02em; }
.gradio-container h2 { margin: .6rem 0 .2rem; font-size: 1.2rem; }
.gradio-container .prose p { margin: 0; }
#notice { border-left: 4px solid #d97706; background: color-mix(in srgb, #d97706 10%, transparent);
  border-radius: var(--radius-sm); padding: .6rem .9rem; }
#about { border-top: 1px solid var(--border-color-primary); padding-top: .8rem; margin-top: .6rem; }
#about * { color: var(--body-text-color-subdued); font-size: .85rem; }
.problem { border-left: 4px solid #dc2626 !important; background: color-mix(in srgb, #dc2626 12%, transparent);
  padding: .6rem .9rem !important; }
.note { padding: .35rem .9rem !important; color: var(--body-text-color-subdued); }
.checks p { margin: 0; padding: .35rem .9rem; border-left: 4px solid #16a34a; }
.checks .light::before { content: "\\25cf"; margin-right: .4rem; color: #16a34a; }
.checks .caution { border-color: #d97706; background: color-mix(in srgb, #d97706 10%, transparent); }
.checks .caution::before { color: #d97706; }
.checks .stop { border-color: #dc2626; background: color-mix(in srgb, #dc2626 12%, transparent); }
.checks .stop::before { color: #dc2626; }
[id^="download"] { align-self: start; min-height: 2.9rem; }
#formats { padding: 0; align-self: start; }
#formats > div { padding: 0; }
#formats .prose { display: flex; flex-wrap: wrap; gap: var(--layout-gap); }
#formats #permalink { flex: 1 1 100%; font-size: .9rem; }
#formats a[download] { flex: 0 1 200px; display: flex; align-items: center; justify-content: center;
  text-decoration: none;
  padding: var(--button-large-padding); border-radius: var(--button-large-radius);
  font: var(--button-large-text-weight) var(--button-large-text-size) var(--font);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
#formats a[download]:hover { background: var(--button-secondary-background-fill-hover); }

/* Gradio's default border of blocks in a group has the color of the text. */
.gr-group .block { border-width: 0; }
.gr-group .upload { border: 1px dashed var(--body-text-color-subdued) !important; }

/* Images have a black background in both themes. */
.image-panel, .image-panel .image-container, .image-panel .image-frame, .image-panel button, .image-panel img {
  background: #000 !important; }
.image-panel > label { background: rgb(0 0 0 / .65); color: #e2e8f0; border: 0; box-shadow: none; }
.image-panel > label > span { display: none; }
.image-panel .icon-button-wrapper, .image-panel .icon-button {
  background: rgb(0 0 0 / .65) !important; border: 0 !important; color: #e2e8f0 !important; }
.image-panel img { width: 100%; object-fit: contain; }
.preview img { height: 300px; }

.colorbar i { display: block; height: .8rem; border-radius: var(--radius-sm); }
.colorbar div { display: flex; justify-content: space-between; font-size: .85rem; }

.controls .wrap, #window .wrap { gap: .3rem; }
.controls .wrap label, #window .wrap label { padding: .3rem .45rem; }
@media (max-width: 640px) {
  #download, #download-std, #formats { flex: 1 1 100%; min-width: 0; }
  #formats a[download] { flex: 1 1 30%; }
  .preview img { height: 160px; }
}
"""
