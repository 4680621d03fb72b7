"""What test files share: models, facts, patches, commands, and files that are spoilt."""
