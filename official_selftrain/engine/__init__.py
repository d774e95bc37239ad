"""How steps and loops run on devices; knows neither boxes nor labels."""
