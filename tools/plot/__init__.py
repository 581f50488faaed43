"""`dirtmap plot`: where a disk is dirty, as several bitmaps say, one below the other.

`reading` reads the bitmaps, `cells` shares the disk out among the columns of a picture, and `terminal`, `chart`, `page`
and `files` draw it, for those who look at it.
"""
