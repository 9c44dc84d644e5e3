"""How many images the codec codes together; the command line's parser reads it, before anything heavy is imported."""

MAX_BATCH, LARGEST_BATCH = 64, 4096  # by default, and at most
