"""What jobs are told: the configuration, checked."""
