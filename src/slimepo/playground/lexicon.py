"""The real words of the world. A small model can learn to spell them; the made-up words it has to copy."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Of several lengths: words of different lengths have one longest.
WORDS: tuple[str, ...] = _words("""
    ant bee cow dog elk fox hen owl pig rat bus car cup hat jam key map pen sun tea bear crab
    deer duck frog goat lion seal swan wolf boat bell door fish lamp leaf moon road snow tree
    bread chair cloud eagle glass grape horse house koala lemon mouse music ocean plant river
    sheep snake stone table tiger banana bottle bridge camera candle carrot castle dragon flower
    garden guitar jacket kitten ladder market orange pencil rabbit silver window balloon blanket
    cabbage chicken dolphin giraffe lantern leopard morning octopus penguin picture pumpkin
    rainbow station teacher thunder village volcano whistle
""")

FIELDS: dict[str, tuple[str, ...]] = {
    "name": _words("""
        ada ali amy ann ben bob cem dan eli eva fay gus ida ian ivy jon kai kim leo lia liv
        max mia noa ola pia ron sam tom zoe
    """),
    "city": _words("""
        accra agra baku basel bath bern bonn cairo cork delhi doha dubai essen fez genoa
        graz ghent jaffa kobe kyoto lagos lima lyon milan nice oslo osaka paris perth rome
    """),
    "pet": _words("""
        ape bat bird bug calf cat chick colt crow cub dove fawn finch flea foal gecko goose
        hare kid lamb mole moth mule newt pony puppy pup ram toad wren
    """),
}
