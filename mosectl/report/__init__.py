"""What lies in a folder, patches, evaluations and benches, gathered for one page."""
