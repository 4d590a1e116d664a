"""How the page looks. Nothing is fetched from elsewhere: fonts are the reader's own."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue="sky",
    neutral_hue="slate",
    radius_size="md",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container h1 { margin: .4rem 0 0; letter-spacing: -.02em; }
.gradio-container h2 { margin: 1rem 0 0; font-size: 1.15rem; }
.lead { color: var(--body-text-color-subdued); }
#notice { border-left: 4px solid #d97706; background: color-mix(in srgb, #d97706 10%, transparent);
  border-radius: var(--radius-sm); padding: .6rem .9rem; font-size: .9rem; }
#about { color: var(--body-text-color-subdued); font-size: .85rem; margin-top: 1rem; }
.problem { border-left: 4px solid #dc2626; background: color-mix(in srgb, #dc2626 10%, transparent);
  border-radius: var(--radius-sm); padding: .5rem .8rem; }
.picture, .picture .image-container, .picture .image-frame, .picture button, .picture img { background: #000 !important; }
.picture img { width: 100%; object-fit: contain; }
.preview img { height: 300px; }
"""
