"""What other programs print about changed parts of a disk; a module for each format, a function ``read`` in each.

``read(source, marks)`` reads a whole document in bounded memory and hands every range that may have changed to
`dirtmap.tools.foreign.marks.Marks`. What is not clearly of the format is refused, by its place in the document.
"""
