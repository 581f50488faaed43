"""The bitmaps of one image or device, whichever container has them."""
