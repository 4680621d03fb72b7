"""Methods side by side: configuration, runs, report."""
