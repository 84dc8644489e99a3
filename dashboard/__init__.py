"""How the numbers are shown: one page over run files, live while they are recorded.

`figures` turns data into Plotly figures and is usable without Dash, in a notebook or a report; the
modules beside it are the page. Importing this package loads neither Dash nor Plotly.
"""
