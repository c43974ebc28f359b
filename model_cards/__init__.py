"""The templates of the cards that go to the Hub."""
