"""Short descriptions that reason about nothing: the control for what is language and what is reasoning.

Written for this book, about as long as the stored answers of :mod:`attnlab.data.word_problems`.
"""

#: request and text
PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Describe a harbour in the morning.",
        "The boats lay close together and knocked against each other when a ferry passed. On the quay a woman in a yellow coat "
        "was washing crates with a hose, and the water ran in thin lines back into the harbour. Gulls walked behind her as if "
        "they had an appointment. It smelled of diesel, of rope and of the bread that somebody was baking in the street behind "
        "the fish hall. A boy sat on a bollard and ate an apple. The sun stood low over the breakwater, and every mast drew a "
        "long shadow across the wet stones, all the way up to the door of the old customs house.",
    ),
    (
        "Describe a garden in winter.",
        "Nothing moved except the smoke from the neighbour's chimney. The beds were covered with fir branches, and between the "
        "rows of cut roses the snow had kept the tracks of a cat. Somebody had left a watering can under the pear tree, full of "
        "ice. The bench by the wall was dark with damp, but the moss on it shone greener than in summer. From time to time a "
        "little snow slid from the roof of the shed and fell without a sound. Behind the hedge a child was pulling a sledge "
        "along the road and singing to herself.",
    ),
    (
        "Describe a railway station at night.",
        "The last train had left, and the clock above the platform went on by itself. A man with a broom pushed paper cups in "
        "front of him, past the closed kiosk and the photo booth with its torn curtain. Two travellers slept on their rucksacks. "
        "The light of the vending machine coloured the floor blue. Far out, where the rails came together, a signal changed "
        "from red to green for nobody. It was cold, and the iron of the benches had taken on the smell of rain. Once a voice "
        "came out of the loudspeaker, said half a word and fell silent.",
    ),
    (
        "Describe an old kitchen.",
        "The table stood in the middle, and its top was as pale as a bone from all the scrubbing. Copper pans hung above the "
        "stove by size, the smallest no larger than a cup. Along the window sill were jars of buttons, beans and dried mint, "
        "and a radio with a broken dial that still played dance music. The tiles near the sink were cracked like the back of a "
        "turtle. When the kettle began to hum the dog lifted his head, looked at the door and put it down again. In the larder "
        "it was dark and smelled of apples.",
    ),
    (
        "Describe a market in a small town.",
        "By eight o'clock the square was full. Farmers stood behind pyramids of cabbages and called to people whom they knew by "
        "name. There was honey in tall glasses, cheese under wet cloths, and a van from which a cheerful man sold socks and "
        "batteries. Children slipped between the stalls with slices of melon in their hands. An old couple argued softly about "
        "tomatoes. Over it all rang the bell of the town hall, a little out of tune, and the pigeons rose, made one round above "
        "the roofs and settled again on the same gutter.",
    ),
    (
        "Describe a walk through a forest.",
        "The path was soft with needles and turned so often that the village was soon forgotten. Light came down in narrow "
        "strips and lay on ferns, on a fallen trunk, on the wings of small flies. Somewhere a woodpecker was at work. The air "
        "was cool under the spruces and warm again in the clearings, where blackberries grew over the stumps. A brook crossed "
        "the way, brown and quick, and somebody had laid three flat stones in it. Beyond, the ground rose to a meadow with a "
        "hunter's hut whose shutters had been painted red many years ago.",
    ),
    (
        "Describe a workshop of a clockmaker.",
        "All the clocks told different times, and all of them ticked. Under the lamp lay a brass plate with screws as small as "
        "poppy seeds, sorted into lids. The clockmaker wore a grey apron and held his breath whenever he bent over the tweezers. "
        "On the wall hung calendars from other decades, a photograph of a lighthouse and the bill of a shop that no longer "
        "existed. A cuckoo came out, bowed and went in again without a sound, since its bellows had been taken away for repair. "
        "Through the open door one could hear the baker's boy whistling in the lane.",
    ),
    (
        "Describe a thunderstorm over a lake.",
        "First the wind stopped. The water turned the colour of slate, and the sails on the other shore came down one after the "
        "other. Then a white line ran across the lake, the reeds lay flat, and the rain was there. It drummed on the upturned "
        "boats and on the tin roof of the bathing hut, so loudly that the people inside only smiled at each other. Lightning "
        "showed the mountains for a moment, pale and very near. After half an hour it was over. Drops fell from the trees, the "
        "ducks came back out of the rushes, and the air smelled of stones.",
    ),
)
