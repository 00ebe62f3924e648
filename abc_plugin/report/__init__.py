"""Runs and completions to look at; imports neither torch nor OpenRLHF.

samples, records, runs      what evaluate, a training run and TensorBoard wrote
statistics                  a mean with its error
tokens, html, plots         the one style of tokens, pages and figures; templates/ has the pages
heatmap, page, training     what is drawn and shown
command, show               ``abc-rlhf report`` and ``abc-rlhf show``
"""
