"""Files and folders: opened safely, checked, written atomically; safetensors, checkpoint shards, locks, places."""
