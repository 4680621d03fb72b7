"""Facts and corpora: records, and one reader for each file shape. Knows no torch."""
