"""`python -m mosectl`, also for `accelerate launch -m mosectl stats …`."""

from mosectl.cli.main import main

main()
