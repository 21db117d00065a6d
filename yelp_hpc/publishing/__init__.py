"""The finished adapter on the Hub: card, token, upload and export."""
