"""What is wrong with a dataset on disk: ``split.check_dataset`` finds it, ``report`` shows it."""
