"""The page of several runs' histories: curves that can be hovered, zoomed and toggled, heat maps of
experts' use, tables; one file that asks nothing of a network.

The curves are drawn by uPlot (`uplot/`, MIT, 51 kB): of the libraries that are kept it is the
smallest with zoom and cursors, and a page for people to keep should not be a megabyte of program.
"""
