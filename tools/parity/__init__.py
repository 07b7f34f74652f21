"""Replay numbers that another implementation recorded, through the classes that train and predict."""
