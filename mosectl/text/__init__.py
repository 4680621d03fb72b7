"""Text and tables on their way to people: what others wrote made safe to show, Markdown, JSON."""
