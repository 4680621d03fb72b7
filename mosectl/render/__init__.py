"""Everything that is shown: terminal tables, HTML, charts. Only this package prints."""
